"""Two stores read as one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tierstore.contracts import ReadRequest
from tierstore.errors import StoreError, StoreReadError
from tierstore.extents import Extent
from tierstore.hf.joined import BothFence, JoinedStore
from tierstore.stores.safetensors import SafetensorsStore
from tierstore.stores.workers import ReadFence
from tierstore.testing.store_contract import Opened, StoreContract, raw_bytes, read_tensor, sample_tensors


def joined_of(folder: Path, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> JoinedStore:
    save_file(first, folder / "first.safetensors")
    save_file(second, folder / "second.safetensors")
    return JoinedStore(SafetensorsStore(folder / "first.safetensors"), SafetensorsStore(folder / "second.safetensors"))


class TestJoinedStore(StoreContract):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Opened]:
        tensors = sample_tensors()
        names = list(tensors)
        store = joined_of(tmp_path, {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]})
        yield store, {name: raw_bytes(tensor) for name, tensor in tensors.items()}
        store.close()


def test_a_name_in_both_is_the_second_s(tmp_path: Path) -> None:
    store = joined_of(tmp_path, {"a": torch.zeros(3)}, {"a": torch.ones(3)})
    assert torch.equal(read_tensor(store, "a").view(torch.float32), torch.ones(3))
    assert [path.name for path in store.paths] == ["first.safetensors", "second.safetensors"]
    store.close()


def test_one_read_from_both_has_one_fence(tmp_path: Path) -> None:
    store = joined_of(tmp_path, {"a": torch.arange(9)}, {"b": torch.arange(7)})
    into = [torch.zeros(9, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)]
    fence = store.read(
        [
            ReadRequest(store.pieces(name)[0].file, store.pieces(name)[0].extent, flat.view(torch.uint8))
            for name, flat in zip("ab", into, strict=True)
        ]
    )
    fence.gate()
    assert isinstance(fence, BothFence)
    assert fence.done()
    assert 0 < fence.started <= fence.finished
    assert torch.equal(into[0], torch.arange(9))
    assert torch.equal(into[1], torch.arange(7))
    store.close()


def test_no_read_goes_on_after_the_other_was_refused(tmp_path: Path) -> None:
    store = joined_of(tmp_path, {"a": torch.arange(9)}, {"b": torch.arange(7)})
    too_small = ReadRequest(0, store.pieces("a")[0].extent, torch.zeros(1, dtype=torch.uint8))
    fine = ReadRequest(1, store.pieces("b")[0].extent, torch.zeros(56, dtype=torch.uint8))
    with pytest.raises(StoreError):
        store.read([too_small, fine])
    store.close()


def test_both_are_waited_for_though_the_first_fails() -> None:
    one, other = ReadFence(1, []), ReadFence(1, [])
    both = BothFence(one, other)
    one.expect(1)
    other.expect(1)
    one.finish(StoreReadError("first"))
    assert not both.done()
    assert both.finished == 0.0
    other.finish()
    with pytest.raises(StoreError, match="first"):
        both.wait()
    assert both.done()


def test_reads_beyond_both_are_errors(tmp_path: Path) -> None:
    store = joined_of(tmp_path, {"a": torch.arange(9)}, {"b": torch.arange(7)})
    with pytest.raises(StoreError):
        store.read([ReadRequest(2, Extent(0, 1), torch.zeros(1, dtype=torch.uint8))]).wait()
    store.close()
