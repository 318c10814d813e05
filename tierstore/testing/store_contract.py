"""What every ``Store`` must do. Derive, override the ``opened`` fixture, and pytest runs the rest."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.contracts import Fence, ReadRequest, Store, WritableStore
from tierstore.errors import StoreError, StoreReadError
from tierstore.extents import Extent

Opened = tuple[Store, Mapping[str, bytes]]
"""A store, and the bytes that it must give for each of its tensors."""
GUARD = 0xA5


def sample_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of awkward names, dtypes and sizes: empty, scalar, odd, a page, larger than a page."""
    random = torch.Generator().manual_seed(seed)

    def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        nbytes = torch.empty(shape, dtype=dtype).nbytes
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (nbytes,), dtype=torch.uint8, generator=random)
        return raw.view(dtype).reshape(shape)

    return {
        "empty": of(torch.float32, 0, 7),
        "scalar": of(torch.int64),
        "model.layers.0.weight": of(torch.bfloat16, 301, 77),
        "page": of(torch.uint8, 4096),
        "mask": of(torch.bool, 13),
        "model/odd näme": of(torch.uint8, 70_001),
        "big": of(torch.float32, 512, 257),
    }


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a contiguous tensor."""
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def as_buffer(data: bytes) -> torch.Tensor:
    """A fresh buffer that holds ``data``."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def read_tensor(store: Store, name: str) -> torch.Tensor:
    """All bytes of tensor ``name``, put together from its pieces."""
    whole = torch.full((store.specs[name].nbytes,), GUARD, dtype=torch.uint8)
    store.read([ReadRequest(p.file, p.extent, whole[p.at : p.at + p.extent.nbytes]) for p in store.pieces(name)]).wait()
    return whole


def open_descriptors() -> set[str]:
    """What the process has open, as ``number -> target``."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


class StoreContract:
    """Laws of ``Store``."""

    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Opened]:
        """An open store with at least one tensor of more than 8 KiB; closes it after the test."""
        raise NotImplementedError("override opened")

    @pytest.fixture(autouse=True)
    def before(self) -> tuple[set[threading.Thread], set[str]]:
        """Threads and descriptors there were before the store was opened."""
        return set(threading.enumerate()), open_descriptors()

    def test_names_every_tensor(self, opened: Opened) -> None:
        store, truth = opened
        assert store.specs.keys() == truth.keys()
        for name, spec in store.specs.items():
            assert spec.name == name
            assert spec.nbytes == len(truth[name])
        assert store.tier in ("nvme", "ram")

    def test_pieces_cover_each_tensor_once(self, opened: Opened) -> None:
        store, truth = opened
        for name, data in truth.items():
            spans = sorted((piece.at, piece.at + piece.extent.nbytes) for piece in store.pieces(name))
            assert [start for start, _ in spans] + [len(data)] == [0] + [end for _, end in spans]

    def test_an_unknown_name_is_a_key_error(self, opened: Opened) -> None:
        with pytest.raises(KeyError):
            opened[0].pieces("no such tensor")

    def test_reads_whole_tensors(self, opened: Opened) -> None:
        store, truth = opened
        for name, data in truth.items():
            assert torch.equal(read_tensor(store, name), as_buffer(data)), name

    def test_reads_any_part_anywhere(self, opened: Opened) -> None:
        store, truth = opened

        @settings(deadline=None, max_examples=60)
        @given(seed=st.integers(0, 2**32 - 1))
        def law(seed: int) -> None:
            _read_parts(store, truth, Random(seed))

        law()

    def test_many_readers_at_once(self, opened: Opened) -> None:
        store, truth = opened

        def read_some(seed: int) -> None:
            for part in range(10):
                _read_parts(store, truth, Random(seed * 100 + part))

        with ThreadPoolExecutor(8) as readers:
            list(readers.map(read_some, range(16)))

    def test_many_reads_under_way(self, opened: Opened) -> None:
        store, truth = opened
        started = []
        for _ in range(30):
            for name, data in truth.items():
                for piece in store.pieces(name):
                    into = torch.full((piece.extent.nbytes,), GUARD, dtype=torch.uint8)
                    fence = store.read([ReadRequest(piece.file, piece.extent, into)])
                    started.append((fence, into, data[piece.at : piece.at + piece.extent.nbytes]))
        for fence, into, wanted in reversed(started):
            fence.wait()
            assert torch.equal(into, as_buffer(wanted))

    def test_nothing_is_read_at_once(self, opened: Opened) -> None:
        store, truth = opened
        name = max(truth, key=lambda name: len(truth[name]))
        file = store.pieces(name)[0].file
        empty = ReadRequest(file, Extent(0, 0), torch.empty(0, dtype=torch.uint8))
        for requests in ([], [empty], [empty, empty]):
            fence = store.read(requests)
            fence.wait()
            assert fence.done()

    def test_a_fence_may_be_asked_often(self, opened: Opened) -> None:
        store, truth = opened
        name = max(truth, key=lambda name: len(truth[name]))
        piece = store.pieces(name)[0]
        into = torch.empty(piece.extent.nbytes, dtype=torch.uint8)
        fence = store.read([ReadRequest(piece.file, piece.extent, into)])
        assert isinstance(fence, Fence)
        assert fence.done() in (True, False)
        for _ in range(3):
            fence.gate()
            fence.wait()
            assert fence.done()

    def test_a_read_beyond_the_end_fails_its_fence_alone(self, opened: Opened) -> None:
        store, truth = opened
        name = max(truth, key=lambda name: len(truth[name]))
        piece = store.pieces(name)[0]
        for offset in (1 << 40, (1 << 63) + 1):
            into = torch.empty(100, dtype=torch.uint8)
            bad = store.read([ReadRequest(piece.file, Extent(offset, 100), into)])
            for _ in range(2):
                with pytest.raises(StoreReadError, match="wanted"):
                    bad.wait()
                with pytest.raises(StoreReadError):
                    bad.gate()
                assert bad.done()
        assert torch.equal(read_tensor(store, name), as_buffer(truth[name]))

    def test_a_part_is_never_given_as_a_whole(self, opened: Opened) -> None:
        store, truth = opened
        name = max(truth, key=lambda name: len(truth[name]))
        piece = store.pieces(name)[0]
        good, bad = torch.empty(piece.extent.nbytes, dtype=torch.uint8), torch.empty(100, dtype=torch.uint8)
        fence = store.read(
            [
                ReadRequest(piece.file, piece.extent, good),
                ReadRequest(piece.file, Extent(1 << 40, 100), bad),
            ]
        )
        with pytest.raises(StoreReadError):
            fence.wait()

    @pytest.mark.parametrize("nbytes", [0, 99, 101])
    def test_refuses_a_buffer_of_another_size(self, opened: Opened, nbytes: int) -> None:
        store, truth = opened
        name = max(truth, key=lambda name: len(truth[name]))
        piece = store.pieces(name)[0]
        into = torch.full((nbytes,), GUARD, dtype=torch.uint8)
        with pytest.raises(StoreError):
            store.read([ReadRequest(piece.file, Extent(piece.extent.offset, 100), into)]).wait()
        assert bool((into == GUARD).all())

    @pytest.mark.parametrize("file", [-1, 1 << 30])
    def test_refuses_a_file_it_does_not_have(self, opened: Opened, file: int) -> None:
        into = torch.empty(10, dtype=torch.uint8)
        with pytest.raises(StoreError):
            opened[0].read([ReadRequest(file, Extent(0, 10), into)]).wait()

    def test_close_is_idempotent_and_ends_reading(self, opened: Opened) -> None:
        store, truth = opened
        name = max(truth, key=lambda name: len(truth[name]))
        piece = store.pieces(name)[0]
        into = torch.empty(piece.extent.nbytes, dtype=torch.uint8)
        for _ in range(2):
            store.close()
            with pytest.raises(StoreError):
                store.read([ReadRequest(piece.file, piece.extent, into)])
        assert store.specs.keys() == truth.keys()

    def test_close_ends_every_read(self, opened: Opened) -> None:
        store, truth = opened
        name = max(truth, key=lambda name: len(truth[name]))
        piece = store.pieces(name)[0]
        started = []
        for _ in range(200):
            into = torch.empty(piece.extent.nbytes, dtype=torch.uint8)
            started.append((store.read([ReadRequest(piece.file, piece.extent, into)]), into))
        store.close()
        wanted = as_buffer(truth[name][piece.at : piece.at + piece.extent.nbytes])
        for fence, into in started:
            assert fence.done()
            try:
                fence.wait()
            except StoreReadError:
                continue
            assert torch.equal(into, wanted)

    def test_close_leaves_no_thread_and_no_descriptor(
        self, opened: Opened, before: tuple[set[threading.Thread], set[str]]
    ) -> None:
        store, truth = opened
        for name in truth:
            read_tensor(store, name)
        store.close()
        assert set(threading.enumerate()) - before[0] == set()
        assert open_descriptors() - before[1] == set()


class WritableStoreContract(StoreContract):
    """Laws of ``WritableStore``, whose ``opened`` gives one."""

    def test_what_is_written_is_read(self, opened: Opened) -> None:
        store, truth = cast(WritableStore, opened[0]), dict(opened[1])
        for turn in range(2):
            for name in list(truth):
                truth[name] = Random(f"{name}{turn}").randbytes(len(truth[name]))
                store.write(name, as_buffer(truth[name]))
                for other, data in truth.items():
                    assert torch.equal(read_tensor(store, other), as_buffer(data)), (name, other)

    def test_a_refused_write_changes_nothing(self, opened: Opened) -> None:
        store, truth = cast(WritableStore, opened[0]), opened[1]
        name = max(truth, key=lambda name: len(truth[name]))
        for nbytes in (0, len(truth[name]) - 1, len(truth[name]) + 1):
            with pytest.raises(StoreError):
                store.write(name, torch.zeros(nbytes, dtype=torch.uint8))
        with pytest.raises(KeyError):
            store.write("no such tensor", torch.zeros(1, dtype=torch.uint8))
        assert torch.equal(read_tensor(store, name), as_buffer(truth[name]))

    def test_close_ends_writing(self, opened: Opened) -> None:
        store, truth = cast(WritableStore, opened[0]), opened[1]
        name = max(truth, key=lambda name: len(truth[name]))
        store.close()
        with pytest.raises(StoreError):
            store.write(name, torch.zeros(len(truth[name]), dtype=torch.uint8))


def _read_parts(store: Store, truth: Mapping[str, bytes], random: Random) -> None:
    """Read some parts of some tensors in one go, at any address, and look at every byte around them too."""
    parts: list[tuple[int, bytes]] = []
    requests: list[ReadRequest] = []
    ground = torch.full((1 << 20,), GUARD, dtype=torch.uint8)
    at = random.randrange(5000)
    for _ in range(random.randrange(1, 12)):
        name = random.choice(list(truth))
        piece = random.choice(store.pieces(name))
        skip = random.randint(0, piece.extent.nbytes)
        nbytes = min(piece.extent.nbytes - skip, random.choice([0, 1, 2, 100, 511, 512, 4096, 9000, 65536, 1 << 19]))
        offset = piece.extent.offset + skip
        at += random.choice([0, 0, 1, 7, 64, (offset - at - ground.data_ptr()) % 512])
        if at + nbytes > ground.numel():
            break
        requests.append(ReadRequest(piece.file, Extent(offset, nbytes), ground[at : at + nbytes]))
        parts.append((at, truth[name][piece.at + skip : piece.at + skip + nbytes]))
        at += nbytes
    random.shuffle(requests)
    store.read(requests).wait()
    wanted = torch.full_like(ground, GUARD)
    for start, data in parts:
        wanted[start : start + len(data)] = as_buffer(data)
    assert torch.equal(ground, wanted)
