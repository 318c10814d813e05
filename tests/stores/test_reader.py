"""Reads are exact wherever they land, few, past the page cache, and fail as a whole."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tierstore.contracts import ReadRequest
from tierstore.errors import StoreError, StoreReadError
from tierstore.extents import Extent
from tierstore.stores import reader
from tierstore.stores.reader import Reader
from tierstore.testing.store_contract import open_descriptors

SIZES = (0, 1, 700, 5000, 123_457, 3_000_001)
Preadv = Callable[..., int]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    random = Random(7)
    paths = [tmp_path / f"{number}.bin" for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(random.randbytes(size))
    return paths


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(offset, bytes, direct) of each read that the system is asked for from now on."""
    seen: list[tuple[int, int, bool]] = []
    plain = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        seen.append((offset, len(buffers[0]), is_direct(fd)))
        return plain(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def need_direct(path: Path) -> None:
    with open_reader([path]) as opened:
        if not opened.direct[0]:
            pytest.skip("the temporary directory has no O_DIRECT")


def open_reader(paths: Sequence[Path], **options: Any) -> closing[Reader]:
    return closing(Reader(paths, **options))


def buffer(nbytes: int, phase: int = 0, block: int = 4096) -> torch.Tensor:
    """Bytes at an address that is ``phase`` modulo ``block``."""
    room = torch.zeros(nbytes + 2 * block, dtype=torch.uint8)
    start = (phase - room.data_ptr()) % block
    return room[start : start + nbytes]


def content(path: Path, extent: Extent) -> torch.Tensor:
    data = path.read_bytes()[extent.offset : extent.end]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@pytest.fixture(params=["direct", "buffered", "refuses to open", "refuses to read", "opened at each read"])
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ways to read that must not differ in what they read."""
    plain_open, plain_preadv = os.open, os.preadv

    def refuse_open(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_open(path, flags, *rest)

    def refuse_read(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        if is_direct(fd) and offset >= 4096:  # the trial at open passes, what follows does not
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_preadv(fd, buffers, offset, *flags)

    match request.param:
        case "buffered":
            return {"direct": False}
        case "refuses to open":
            monkeypatch.setattr(os, "open", refuse_open)
        case "refuses to read":
            monkeypatch.setattr(os, "preadv", refuse_read)
        case "opened at each read":
            monkeypatch.setattr(reader, "KEPT_OPEN", 0)
    return {}


def test_any_extent_to_any_address(files: list[Path], options: dict[str, Any]) -> None:
    random = Random(1)
    with open_reader(files, chunk_nbytes=1 << 18, **options) as opened:
        assert opened.sizes == SIZES
        for _ in range(60):
            requests = []
            for _ in range(random.randrange(1, 8)):
                file = random.randrange(len(SIZES))
                offset = random.randint(0, SIZES[file])
                nbytes = min(SIZES[file] - offset, random.choice([0, 1, 511, 512, 4096, 70_000, 1 << 20]))
                extent = Extent(offset, nbytes)
                phase = random.choice([offset, offset + 1, random.randrange(4096)])
                requests.append(ReadRequest(file, extent, buffer(nbytes, phase % 512, 512)))
            opened.read(requests).wait()
            for request in requests:
                assert torch.equal(torch.as_tensor(request.into), content(files[request.file], request.extent))


def test_one_extent_for_many_readers(files: list[Path]) -> None:
    """Overlapping requests, larger than a chunk, that do not agree with the block."""
    whole = Extent(0, SIZES[5])
    with open_reader(files, chunk_nbytes=1 << 18) as opened:
        into = [buffer(SIZES[5], phase) for phase in (1, 2, 0, 0)]
        opened.read([ReadRequest(5, whole, part) for part in into]).wait()
    for part in into:
        assert torch.equal(part, content(files[5], whole))


def test_what_agrees_is_read_into_place(files: list[Path], calls: list[tuple[int, int, bool]]) -> None:
    need_direct(files[5])
    with open_reader(files, chunk_nbytes=1 << 20) as opened:
        calls.clear()
        opened.read([ReadRequest(5, Extent(4096, 2 << 20), buffer(2 << 20))]).wait()
        assert sorted(calls) == [(4096, 1 << 20, True), (4096 + (1 << 20), 1 << 20, True)]


def test_neighbours_cost_one_read(files: list[Path], calls: list[tuple[int, int, bool]]) -> None:
    need_direct(files[5])
    with open_reader(files) as opened:
        calls.clear()
        requests = [ReadRequest(5, Extent(10_000 + 600 * n, 500), buffer(500, 3)) for n in range(100)]
        Random(0).shuffle(requests)
        opened.read(requests).wait()
        assert len(calls) == 1
        for request in requests:
            assert torch.equal(torch.as_tensor(request.into), content(files[5], request.extent))


def test_neighbours_in_memory_too_are_one_request(files: list[Path], calls: list[tuple[int, int, bool]]) -> None:
    need_direct(files[5])
    into = buffer(1_000_000, 100)
    cuts = [0, 7, 70_000, 400_001, 999_999, 1_000_000]
    with open_reader(files) as opened:
        calls.clear()
        opened.read(
            [ReadRequest(5, Extent(4196 + start, end - start), into[start:end]) for start, end in pairwise(cuts)]
        ).wait()
        assert len(calls) == 3  # a ragged head, the interior, a ragged tail
    assert torch.equal(into, content(files[5], Extent(4196, 1_000_000)))


def test_what_does_not_agree_is_read_past_the_page_cache_too(
    files: list[Path], calls: list[tuple[int, int, bool]]
) -> None:
    need_direct(files[5])
    with open_reader(files) as opened:
        calls.clear()
        into = buffer(1_000_000, 1)
        opened.read([ReadRequest(5, Extent(100, 1_000_000), into)]).wait()
        assert torch.equal(into, content(files[5], Extent(100, 1_000_000)))
        assert opened.direct[5]
        assert all(direct for _, _, direct in calls)


def test_an_idle_thread_keeps_no_file_open(files: list[Path]) -> None:
    with open_reader(files, threads=1) as opened:
        before = len(open_descriptors())
        opened.read([ReadRequest(3, Extent(0, 5000), buffer(5000))]).wait()
        opened.reopen(3)
        assert len(open_descriptors()) == before


def test_far_extents_are_read_apart(files: list[Path], calls: list[tuple[int, int, bool]]) -> None:
    with open_reader(files) as opened:
        calls.clear()
        opened.read([ReadRequest(5, Extent(offset, 10), buffer(10)) for offset in (0, 100_000, 200_000)]).wait()
        assert len(calls) == 3


def cached_pages(path: Path) -> int:
    """Pages of the file that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        assert libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages) == 0
        del start
        return sum(page & 1 for page in pages)


def test_the_page_cache_is_left_empty(tmp_path: Path) -> None:
    path = tmp_path / "cached.bin"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if cached_pages(path):
        pytest.skip("this filesystem lives in the page cache")
    for direct in (True, False):
        with open_reader([path], threads=1, direct=direct) as opened:
            opened.read([ReadRequest(0, Extent(0, 1 << 20), buffer(1 << 20))]).wait()
        assert cached_pages(path) == 0
    path.read_bytes()
    assert cached_pages(path) == (1 << 20) // mmap.PAGESIZE


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODATA, errno.EBADMSG])
def test_an_error_of_the_disk_names_file_and_offset(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    plain = os.preadv

    def broken(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        if offset <= 1 << 20 < offset + len(buffers[0]):
            raise OSError(code, os.strerror(code))
        return plain(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", broken)
    with open_reader(files, chunk_nbytes=1 << 19) as opened:
        fence = opened.read([ReadRequest(5, Extent(0, SIZES[5]), buffer(SIZES[5]))])
        with pytest.raises(StoreReadError, match=rf"5\.bin' at byte 1048576: wanted 524288 .*{os.strerror(code)}"):
            fence.wait()
        assert fence.done()
        opened.read([ReadRequest(5, Extent(2 << 20, 100), buffer(100))]).wait()


def test_a_short_read_goes_on_where_it_stopped(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.preadv

    def short(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        return plain(fd, [buffers[0][:8192]], offset, *flags)

    monkeypatch.setattr(os, "preadv", short)
    into = buffer(SIZES[5])
    with open_reader(files) as opened:
        opened.read([ReadRequest(5, Extent(0, SIZES[5]), into)]).wait()
    assert torch.equal(into, content(files[5], Extent(0, SIZES[5])))


class Gate:
    """Holds the threads that read until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        plain = os.preadv

        def held(*arguments: Any) -> int:
            self.reached.set()
            assert self.opened.wait(60)
            return plain(*arguments)

        monkeypatch.setattr(os, "preadv", held)


def test_close_fails_what_is_queued_and_finishes_what_runs(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Reader(files, threads=1)
    gate = Gate(monkeypatch)
    running, queued = (
        opened.read([ReadRequest(3, Extent(0, 100), buffer(100))]),
        opened.read([ReadRequest(3, Extent(0, 100), buffer(100))]),
    )
    assert gate.reached.wait(60)
    assert not running.done()
    closing = threading.Thread(target=opened.close)
    closing.start()
    opened._workers._closed.wait()
    gate.opened.set()
    closing.join()
    running.wait()
    with pytest.raises(StoreReadError, match="closed before"):
        queued.wait()


def test_a_dropped_fence_cancels_nothing(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_reader(files, threads=1) as opened:
        gate = Gate(monkeypatch)
        into = buffer(5000)
        opened.read([ReadRequest(3, Extent(0, 5000), into)])
        after = opened.read([ReadRequest(3, Extent(0, 10), buffer(10))])
        gate.opened.set()
        after.wait()  # one thread: in the order submitted
        assert torch.equal(into, content(files[3], Extent(0, 5000)))


def test_a_fence_tells_when_and_how_much(files: list[Path]) -> None:
    with open_reader(files) as opened:
        first = opened.read([ReadRequest(4, Extent(0, 123_000), buffer(123_000))])
        first.wait()
        second = opened.read([ReadRequest(4, Extent(0, 1), buffer(1)), ReadRequest(4, Extent(5, 2), buffer(2))])
        second.wait()
    assert (first.nbytes, second.nbytes) == (123_000, 3)
    assert 0 < first.started <= first.finished <= second.started <= second.finished


def test_a_dropped_reader_ends_its_threads_and_closes_its_files(files: list[Path]) -> None:
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    opened = Reader(files, threads=3)
    opened.read([ReadRequest(4, Extent(0, 1000), buffer(1000))]).wait()
    mine = set(threading.enumerate()) - threads
    assert {thread.name for thread in mine} == {f"tierstore-read-{number}" for number in range(3)}
    del opened
    gc.collect()
    for thread in mine:
        thread.join(60)
        assert not thread.is_alive()
    assert open_descriptors() == descriptors


def test_an_open_reader_lets_the_process_end(files: list[Path]) -> None:
    program = (
        "import sys, torch\n"
        "from tierstore.stores.reader import Reader\n"
        "from tierstore.contracts import ReadRequest\n"
        "from tierstore.extents import Extent\n"
        "opened = Reader([sys.argv[1]])\n"
        "into = torch.empty(3_000_001, dtype=torch.uint8)\n"
        "fences = [opened.read([ReadRequest(0, Extent(0, 3_000_001), into)]) for _ in range(50)]\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(files[5])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_reopen_reads_what_the_path_leads_to_now(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    old = content(files[3], Extent(0, 5000))
    descriptors = open_descriptors()
    with open_reader(files, threads=1) as opened:
        (new := files[3].with_suffix(".new")).write_bytes(bytes(5000))
        before = open_descriptors()
        gate = Gate(monkeypatch)
        earlier, later = buffer(5000), buffer(5000)
        fence = opened.read([ReadRequest(3, Extent(0, 5000), earlier)])
        os.replace(new, files[3])
        gate.opened.set()
        opened.reopen(3)
        opened.read([ReadRequest(3, Extent(0, 5000), later)]).wait()
        fence.wait()
        assert torch.equal(earlier, old)
        assert torch.equal(later, torch.zeros(5000, dtype=torch.uint8))
        assert len(open_descriptors()) == len(before)
    assert open_descriptors() == descriptors


def test_a_file_replaced_by_another_is_not_read(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "KEPT_OPEN", 0)
    with open_reader(files) as opened:
        (new := files[3].with_suffix(".new")).write_bytes(bytes(5000))
        os.replace(new, files[3])
        fence = opened.read([ReadRequest(3, Extent(0, 5000), buffer(5000))])
        with pytest.raises(StoreReadError, match="replaced by another file"):
            fence.wait()


def bad_readers(files: list[Path]) -> Iterator[tuple[list[Path], dict[str, Any], str]]:
    yield files, {"threads": 0}, "threads is 0"
    yield files, {"chunk_nbytes": 0}, "chunk_nbytes is 0"
    yield files, {"chunk_nbytes": 5000}, "multiple of 4096"
    yield [*files, files[0].parent], {}, "is a folder"
    yield [*files, files[0].parent / "none"], {}, "cannot open"


def test_a_reader_that_cannot_be_made_leaves_nothing(files: list[Path]) -> None:
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    for paths, options, match in bad_readers(files):
        with pytest.raises(StoreError, match=match):
            Reader(paths, **options)
        assert open_descriptors() == descriptors
        assert set(threading.enumerate()) == threads


def test_device_memory_and_gaps_are_refused(files: list[Path]) -> None:
    with open_reader(files) as opened:
        for into in (torch.empty(100, dtype=torch.uint8, device="meta"), torch.empty(200, dtype=torch.uint8)[::2]):
            with pytest.raises(StoreError, match="contiguous buffer in host memory"):
                opened.read([ReadRequest(3, Extent(0, 100), into)])
