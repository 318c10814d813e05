"""Two stores read as one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tierstore.contracts import ReadRequest
from tierstore.errors import StoreError
from tierstore.hf.joined import BothFence, JoinedStore
from tierstore.stores.memory import MemoryStore

FIRST = {"a": torch.arange(5.0), "shared": torch.zeros(3)}
SECOND = {"b": torch.arange(7, dtype=torch.int32), "shared": torch.ones(3)}


@pytest.fixture
def joined() -> Iterator[JoinedStore]:
    first = MemoryStore(FIRST)
    files = 1 + max(piece.file for name in FIRST for piece in first.pieces(name))
    made = JoinedStore(first, files, MemoryStore(SECOND))
    yield made
    made.close()


def read(store: JoinedStore, *names: str) -> list[torch.Tensor]:
    flats = [torch.empty(store.specs[name].nbytes, dtype=torch.uint8) for name in names]
    fence = store.read(
        [
            ReadRequest(piece.file, piece.extent, flat[piece.at : piece.at + piece.extent.nbytes])
            for name, flat in zip(names, flats, strict=True)
            for piece in store.pieces(name)
        ]
    )
    fence.wait()
    fence.gate()
    assert fence.done()
    return [
        flat.view(getattr(torch, store.specs[name].dtype)).view(store.specs[name].shape)
        for name, flat in zip(names, flats, strict=True)
    ]


def test_each_comes_from_its_own(joined: JoinedStore) -> None:
    assert joined.specs.keys() == FIRST.keys() | SECOND.keys()
    for names in (("a",), ("b",), ("a", "b"), ("b", "shared", "a")):
        want = {**FIRST, **SECOND}
        assert all(torch.equal(have, want[name]) for name, have in zip(names, read(joined, *names), strict=True))
    with pytest.raises(KeyError):
        joined.pieces("neither")


def test_closed_means_both(joined: JoinedStore) -> None:
    joined.close()
    joined.close()
    for name in ("a", "b"):
        with pytest.raises(StoreError):
            read(joined, name)


class _Fence:
    def __init__(self, done: bool, error: Exception | None = None) -> None:
        self.waited = False
        self._done, self._error = done, error

    def done(self) -> bool:
        return self._done

    def wait(self) -> None:
        self.waited = True
        if self._error is not None:
            raise self._error

    gate = wait


def test_both_are_waited_for_though_the_first_fails() -> None:
    other = _Fence(True)
    both = BothFence(_Fence(True, StoreError("first")), other)
    with pytest.raises(StoreError, match="first"):
        both.wait()
    assert other.waited
    assert both.done()
    assert not BothFence(other, _Fence(False)).done()
