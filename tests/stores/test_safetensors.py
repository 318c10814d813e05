"""Checkpoints are read where they lie; whatever is wrong with one is said, at once, in its own words."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from tests.stores.hostile import HOSTILE, entry, packed
from tierstore.contracts import ReadRequest
from tierstore.errors import StoreError, StoreFormatError, StoreReadError
from tierstore.extents import Extent
from tierstore.stores.safetensors import DTYPES, Header, SafetensorsStore, parse_header
from tierstore.tensors import ITEMSIZE
from tierstore.testing.store_contract import as_buffer, open_descriptors, raw_bytes, read_tensor

EXAMPLES = Path(__file__).with_name("hostile")


def header_of(content: bytes) -> Header:
    """As ``read_header`` does, without a file."""
    length = int.from_bytes(content[:8], "little")
    return parse_header(content[8 : 8 + length], len(content), where="it")


@pytest.mark.parametrize("kind", HOSTILE)
def test_each_hostile_checkpoint_is_refused_in_its_own_words(kind: str, tmp_path: Path) -> None:
    hostile = HOSTILE[kind]
    path = hostile.write(tmp_path)
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    with pytest.raises(StoreError, match=hostile.match) as caught:
        SafetensorsStore(path)
    assert type(caught.value) is hostile.error
    assert len(str(caught.value)) < 1000 + 2 * len(str(tmp_path))
    assert set(threading.enumerate()) - threads == set()
    assert open_descriptors() - descriptors == set()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.safetensors")), ids=lambda path: path.stem)
def test_kept_hostile_files_are_refused(path: Path) -> None:
    with pytest.raises(StoreFormatError):
        SafetensorsStore(path)


def test_the_kept_files_are_there() -> None:
    assert len(list(EXAMPLES.glob("*.safetensors"))) >= 6


def test_every_dtype_is_read(tmp_path: Path) -> None:
    header, at = {}, 0
    for code, name in DTYPES.items():
        header[code] = entry(shape=[3], offsets=[at, at + 3 * ITEMSIZE[name]], dtype=code)
        at += 3 * ITEMSIZE[name]
    (tmp_path / "m.safetensors").write_bytes(packed(header, bytes(range(at))))
    store = SafetensorsStore(tmp_path)
    for code, name in DTYPES.items():
        assert store.specs[code].dtype == name
        assert getattr(torch, name).itemsize == store.specs[code].itemsize
        begin, end = header[code]["data_offsets"]
        assert torch.equal(read_tensor(store, code), as_buffer(bytes(range(begin, end))))
    store.close()


def test_metadata_and_paths(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    store = SafetensorsStore(tmp_path)
    assert store.metadata == {"format": "pt"}
    assert store.paths == (tmp_path / "model.safetensors",)
    assert store.tier == "nvme"
    store.close()


def test_a_tensor_that_the_index_leaves_out_is_not_there(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2), "extra": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    store = SafetensorsStore(tmp_path / "model.safetensors.index.json")
    assert list(store.specs) == ["w"]
    with pytest.raises(KeyError):
        store.pieces("extra")
    store.close()


def test_shards_behind_links_are_read(tmp_path: Path) -> None:
    """The way the Hugging Face cache keeps them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.arange(5.0)}, blobs / "0123")
    (snapshot / "a.safetensors").symlink_to("../../blobs/0123")
    (blobs / "4567").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/4567")
    store = SafetensorsStore(snapshot)
    assert torch.equal(read_tensor(store, "w").view(torch.float32), torch.arange(5.0))
    store.close()


def test_the_file_of_the_usual_name_is_taken_among_others(tmp_path: Path) -> None:
    for name in ("consolidated.safetensors", "model.safetensors"):
        save_file({name: torch.ones(1)}, tmp_path / name)
    store = SafetensorsStore(tmp_path)
    assert list(store.specs) == ["model.safetensors"]
    store.close()


def test_a_file_that_shrinks_while_open_fails_the_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {"a": torch.ones(100_000), "b": torch.ones(100_000)}
    save_file(weights, path)
    store = SafetensorsStore(path)
    os.truncate(path, 500_000)
    (first, last) = sorted(store.specs, key=lambda name: store.pieces(name)[0].extent.offset)
    with pytest.raises(StoreReadError, match=r"wanted \d+ bytes, got \d+.*has 500000 now"):
        read_tensor(store, last)
    assert torch.equal(read_tensor(store, first), as_buffer(raw_bytes(weights[first])))
    store.close()


def test_a_file_that_grows_between_header_and_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(10)}, path)
    from tierstore.stores import safetensors

    plain = safetensors.read_header

    def read_and_grow(path: Path) -> Header:
        header = plain(path)
        path.write_bytes(path.read_bytes() + b"more")
        return header

    monkeypatch.setattr(safetensors, "read_header", read_and_grow)
    descriptors = open_descriptors()
    with pytest.raises(StoreFormatError, match="when its header was read"):
        SafetensorsStore(path)
    assert open_descriptors() == descriptors


VALID = save(
    {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")


@settings(deadline=None, max_examples=300)
@given(flips=st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(1, 255)), min_size=1, max_size=4))
@example(flips=[(8, 0x20)])
def test_a_damaged_header_is_refused_or_means_what_it_says(flips: list[tuple[int, int]]) -> None:
    """Where the reference implementation and we differ, we are the stricter one, for a reason listed here."""
    damaged = bytearray(VALID)
    for at, mask in flips:
        damaged[at] ^= mask
    ours = _ours(bytes(damaged))
    theirs = _theirs(bytes(damaged))
    if theirs is None:
        # They refuse metadata whose order of keys they cannot keep, and nothing else that we take.
        assert ours is None
    elif ours is not None:
        assert ours == theirs
    else:
        assert _stricter(bytes(damaged))


def _ours(content: bytes) -> dict[str, tuple[str, list[int]]] | None:
    try:
        header = header_of(content)
    except StoreFormatError:
        return None
    codes = {name: code for code, name in DTYPES.items()}
    return {name: (codes[spec.dtype], list(spec.shape)) for name, spec in header.specs.items()}


def _theirs(content: bytes) -> dict[str, tuple[str, list[int]]] | None:
    fd = os.memfd_create("damaged")
    try:
        os.write(fd, content)
        with safe_open(f"/proc/self/fd/{fd}", framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, UnicodeDecodeError):
        return None
    finally:
        os.close(fd)


def _stricter(content: bytes) -> bool:
    """Whether we refuse by one of the rules that are ours: keys once, no other keys, names without control
    characters, dtypes of whole bytes."""
    with pytest.raises(StoreFormatError) as caught:
        header_of(content)
    return any(rule in str(caught.value) for rule in ("twice", "needs exactly", "name needs", "smaller than a byte"))


def test_reading_beyond_a_tensor_is_reading_the_file(tmp_path: Path) -> None:
    """Extents are the file's: neighbours may be fetched in one read."""
    weights = {"a": torch.arange(1000.0), "b": torch.arange(1000.0, 3000.0)}
    save_file(weights, tmp_path / "m.safetensors")
    store = SafetensorsStore(tmp_path)
    start = min(store.pieces(name)[0].extent.offset for name in weights)
    both = torch.empty(12_000, dtype=torch.uint8)
    store.read([ReadRequest(0, Extent(start, 12_000), both)]).wait()
    assert sorted(both.view(torch.float32).tolist()) == list(range(3000))
    store.close()
