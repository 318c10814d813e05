"""KV pages on disk come back whole or are named as lost, whatever happens to the file, the disk or the process."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from tierstore.contracts import CellRead, PageStore
from tierstore.errors import PageLostError, StoreError, StoreFullError
from tierstore.extents import Extent
from tierstore.stores.page_file import PageFile
from tierstore.stores.page_runs import Run
from tierstore.stores.reader import Reader
from tierstore.testing.page_store_contract import HeldFence, PageStoreContract, cells_of

CELL = 33_856  # of 64, not of 512
Preadv = Callable[..., int]


class TestPageFile(PageStoreContract):
    @pytest.fixture(params=[64, 4096, CELL, "no O_DIRECT", "no file without a name"])
    def opened(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[PageStore]:
        plain = os.open
        refused = {"no O_DIRECT": os.O_DIRECT, "no file without a name": os.O_TMPFILE}.get(request.param)

        def refuse(path: str, flags: int, *rest: int) -> int:
            if refused is not None and flags & refused == refused:
                raise OSError(errno.EINVAL if refused == os.O_DIRECT else errno.EOPNOTSUPP, "refused")
            return plain(path, flags, *rest)

        monkeypatch.setattr(os, "open", refuse)
        cell = CELL if isinstance(request.param, str) else request.param
        with closing(PageFile(tmp_path, cell_nbytes=cell, capacity_nbytes=20 * (cell + 4096))) as store:
            assert os.listdir(tmp_path) == []
            yield store


@contextmanager
def page_file(folder: Path, *, cell: int = CELL, cells: int = 64) -> Iterator[PageFile]:
    with closing(PageFile(folder, cell_nbytes=cell, capacity_nbytes=cells * (cell + 4096))) as store:
        yield store


def path_of(folder: Path) -> str:
    """Where one who means harm finds the file."""
    (path,) = {
        os.path.realpath(f"/proc/self/fd/{fd}"): f"/proc/self/fd/{fd}"
        for fd in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{fd}").startswith(f"{folder}/")
    }.values()
    return path


def put(store: PageFile, cells: int, seed: int = 0, phase: int = 0) -> tuple[Run, torch.Tensor]:
    data = cells_of(store, cells, seed, phase)
    run = store.put(cells, data)
    run.fence.wait()
    return run, data


def lost(store: PageFile, run: Run, data: torch.Tensor) -> set[int]:
    """Which cells of a run are lost. All others must arrive."""
    into = torch.zeros_like(data)
    fence = store.read([CellRead(run, 0, run.cells, into)])
    gone: set[int] = set()
    for wait in (fence.wait, fence.gate):  # as often as one asks
        try:
            wait()
        except PageLostError as error:
            gone = {cell for found, cell in error.cells if found is run}
            if len(gone) != len(error.cells):
                raise
    for cell in set(range(run.cells)) - gone:
        part = slice(cell * store.cell_nbytes, (cell + 1) * store.cell_nbytes)
        assert torch.equal(into[part], data[part]), cell
    return gone


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(offset, bytes, into a thread's own memory) of each read that the system is asked for from now on."""
    seen: list[tuple[int, int, bool]] = []
    plain = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        seen.append((offset, len(buffers[0]), buffers[0].obj is not None))
        return plain(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


@pytest.mark.parametrize("phase", [0, 64])
@pytest.mark.parametrize("cell", [1 << 20, CELL * 40])
def test_large_runs(tmp_path: Path, cell: int, phase: int) -> None:
    with page_file(tmp_path, cell=cell, cells=9) as store:
        run, data = put(store, 9, phase=phase)
        assert lost(store, run, data) == set()


def test_a_whole_run_is_read_straight_into_place(tmp_path: Path, calls: list[tuple[int, int, bool]]) -> None:
    with page_file(tmp_path, cell=1 << 18) as store:
        run, data = put(store, 32)
        into = cells_of(store, 32, 1)
        calls.clear()
        store.read([CellRead(run, 0, 32, into)]).wait()
        assert torch.equal(into, data)
        if store._reader.direct[0]:
            assert sorted(calls) == [(0, 4 << 20, False), (4 << 20, 4 << 20, False)]


def test_neighbouring_cells_cost_one_read(tmp_path: Path, calls: list[tuple[int, int, bool]]) -> None:
    with page_file(tmp_path, cell=4160) as store:
        run, data = put(store, 100)
        into = [torch.zeros(4160, dtype=torch.uint8) for _ in range(100)]
        calls.clear()
        store.read([CellRead(run, cell, 1, part) for cell, part in reversed(list(enumerate(into)))]).wait()
        assert torch.equal(torch.cat(into), data)
        assert len(calls) == 1


@pytest.mark.parametrize("phase", [0, 64])
def test_writes_pass_the_page_cache_from_any_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: int
) -> None:
    direct: list[bool] = []
    plain = os.pwrite

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        direct.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        return plain(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    (tmp_path / "of two pages").write_bytes(bytes(2 * 4096))
    with closing(Reader([tmp_path / "of two pages"])) as reader, page_file(tmp_path) as store:
        if not reader.direct[0]:
            pytest.skip("the temporary directory has no O_DIRECT")
        assert store._reader.blocks == reader.blocks
        put(store, 7, phase=phase)
        assert direct
        assert all(direct)


@pytest.mark.parametrize("cell", [0, 4, 6])
def test_a_flipped_byte_costs_one_cell(tmp_path: Path, cell: int) -> None:
    with page_file(tmp_path) as store:
        run, data = put(store, 7)
        other, others = put(store, 7, seed=1)
        with open(path_of(tmp_path), "r+b") as file:
            file.seek(run.extents[0].offset + cell * CELL + 100)
            file.write(bytes([int(data[cell * CELL + 100]) ^ 1]))
        assert lost(store, run, data) == {cell}
        assert lost(store, other, others) == set()
        with pytest.raises(PageLostError, match=f"1 cells .* cell {cell} of 7 .* CRC32C .* compute them again"):
            store.read([CellRead(run, 0, 7, torch.zeros_like(data))]).wait()
        for number in range(7):
            store.free(run, number)


@pytest.mark.parametrize("end", [0, 1, CELL - 1, CELL, 3 * CELL + 5])
def test_a_file_cut_short_costs_what_was_cut_off(tmp_path: Path, end: int) -> None:
    with page_file(tmp_path) as store:
        run, data = put(store, 5)
        os.truncate(path_of(tmp_path), end)
        assert lost(store, run, data) == {cell for cell in range(5) if (cell + 1) * CELL > end}
        assert lost(store, *put(store, 5, seed=1)) == set()


def test_what_the_disk_cannot_read_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.preadv

    def fails(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        if offset <= 2 * CELL < offset + len(buffers[0]):
            raise OSError(errno.EIO, "Input/output error")
        return plain(fd, buffers, offset, *flags)

    with page_file(tmp_path) as store:
        run, data = put(store, 6)
        monkeypatch.setattr(os, "preadv", fails)
        gone = lost(store, run, data)
        assert 2 in gone
        assert gone <= {1, 2}  # a block of both
        with pytest.raises(PageLostError) as caught:
            store.read([CellRead(run, 2, 1, torch.empty(CELL, dtype=torch.uint8))]).wait()
        assert "Input/output error" in str(caught.value.__cause__)


def test_full_by_its_own_bound(tmp_path: Path) -> None:
    with page_file(tmp_path, cell=4096, cells=4) as store:  # 8 blocks
        runs = [put(store, 2, seed) for seed in range(4)]
        with pytest.raises(StoreFullError, match=r"1 cells .* 4.00 KiB .* free pages, or raise kv_nvme"):
            store.put(1, cells_of(store, 1, 9))
        assert (store.free_nbytes, store.dead_nbytes) == (0, 0)
        for run, _ in runs[::2]:
            store.free(run, 0)
        assert (store.free_nbytes, store.dead_nbytes) == (2 * 4096, 0)
        with pytest.raises(StoreFullError):
            store.put(3, cells_of(store, 3, 9))
        between = put(store, 2, 9)
        assert len(between[0].extents) == 2
        store.free(runs[0][0], 1)
        with pytest.raises(StoreFullError):
            store.put(2, cells_of(store, 2, 9))
        runs[0] = put(store, 1, 9)
        assert lost(store, *between) == lost(store, *runs[0]) == lost(store, *runs[1]) == lost(store, *runs[3]) == set()


@pytest.mark.parametrize("phase", [0, 64])
def test_a_run_lies_between_the_live_cells_of_others(tmp_path: Path, phase: int) -> None:
    with page_file(tmp_path, cells=8) as store:  # of 8 1/4 blocks each
        runs = [put(store, 3, seed) for seed in range(store.free_nbytes // (25 * 4096))]
        for run, _ in runs:
            store.free(run, 1)
        most = store.free_nbytes // CELL
        assert most >= len(runs)
        assert store.dead_nbytes <= len(runs) * 2 * 4096 + len(runs) * 4096
        between, data = put(store, most, 9, phase)
        assert len(between.extents) > 1
        assert lost(store, between, data) == set()
        for run, was in runs:
            for cell in (0, 2):
                into = torch.zeros(CELL, dtype=torch.uint8)
                store.read([CellRead(run, cell, 1, into)]).wait()
                assert torch.equal(into, was[cell * CELL : (cell + 1) * CELL])
        with open(path_of(tmp_path), "r+b") as file:
            file.seek(between.extents[1].offset + 100)
            file.write(b"other")
        assert len(lost(store, between, data)) == 1
        for run, cell in [(run, cell) for run, _ in runs for cell in (0, 2)] + [(between, c) for c in range(most)]:
            store.free(run, cell)
        assert (store.free_nbytes, store.dead_nbytes) == (store.capacity_nbytes // 4096 * 4096, 0)


def reads_sit_still(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reads wait for a while, or for the next write, from now on; set when one has begun."""
    reading, written = threading.Event(), threading.Event()
    plain_read, plain_write = os.preadv, os.pwrite

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        reading.set()
        written.wait(0.2)
        return plain_read(fd, buffers, offset, *flags)

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        done = plain_write(fd, view, offset)
        written.set()
        return done

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pwrite", pwrite)
    return reading


def test_a_cell_is_written_only_when_the_one_before_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``test_space_is_written_anew_only_when_it_was_read``, for a hole in a run that lives on."""
    with page_file(tmp_path, cell=8192, cells=2) as store:  # 6 blocks
        run, data = put(store, 3)
        reading = reads_sit_still(monkeypatch)
        into = torch.zeros_like(data)
        fence = store.read([CellRead(run, 0, 3, into)])
        reading.wait()
        store.free(run, 1)
        again, other = put(store, 1, seed=1)
        assert again.extents == (Extent(8192, 8192),)
        fence.wait()
        assert torch.equal(into, data)
        assert lost(store, again, other) == set()


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [8 * CELL, 400_000])
@pytest.mark.parametrize("phase", [0, 64])
def test_a_full_disk_costs_one_run(tmp_path: Path, limit: int, phase: int) -> None:
    with page_file(tmp_path) as store:
        first = put(store, 6)
        with largest_file(limit):
            data = cells_of(store, 8, 1, phase)
            run = store.put(8, data)
            with pytest.raises(StoreFullError, match=r"KV pages below .*: File too large"):
                run.fence.wait()
        assert store.written_nbytes == 6 * CELL
        with pytest.raises(StoreError, match="wait for its fence"):
            store.read([CellRead(run, 0, 8, data)])
        for cell in range(8):
            store.free(run, cell)
        assert lost(store, *first) == lost(store, *put(store, 8, 2)) == set()


def test_space_is_written_anew_only_when_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read sits still for a while; were the next run's write not to wait for it, it would go on at once."""
    with page_file(tmp_path, cells=4) as store:
        run, data = put(store, 4)
        reading = reads_sit_still(monkeypatch)
        into = torch.zeros_like(data)
        fence = store.read([CellRead(run, 0, 4, into)])
        reading.wait()
        for cell in range(4):
            store.free(run, cell)
        again, other = put(store, 4, seed=1)
        assert again.extents == run.extents
        fence.wait()
        assert torch.equal(into, data)
        assert lost(store, again, other) == set()


def test_close_fails_what_is_queued_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, reading, read_on = HeldFence(), threading.Event(), threading.Event()
    plain = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        reading.set()
        read_on.wait()
        return plain(fd, buffers, offset, *flags)

    store = PageFile(tmp_path, cell_nbytes=CELL, capacity_nbytes=64 * CELL, threads=1)
    run, data = put(store, 4)
    monkeypatch.setattr(os, "preadv", preadv)
    into = [torch.zeros_like(data) for _ in range(3)]
    reads = [store.read([CellRead(run, 0, 4, part)]) for part in into]
    writes = [store.put(4, data, after=[held]), store.put(4, data)]
    held.reached.wait()
    reading.wait()
    closing_it = threading.Thread(target=store.close)
    closing_it.start()
    store._reader._workers._closed.wait()
    read_on.set()
    store._writer._closed.wait()
    assert not writes[0].fence.done()
    held.released.set()
    closing_it.join()
    assert all(fence.done() for fence in (*reads, *(write.fence for write in writes)))
    writes[0].fence.wait()
    for fence in (*reads[1:], writes[1].fence):
        with pytest.raises(StoreError, match="closed"):
            fence.wait()
    store.close()


def test_ends_with_its_last_reference(tmp_path: Path) -> None:
    store = PageFile(tmp_path, cell_nbytes=64, capacity_nbytes=1 << 20)
    run, _ = put(store, 3)
    del store, run  # no_leaks looks for threads and descriptors


def test_folders(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    with page_file(new):
        assert new.is_dir()
    assert not new.exists()
    with page_file(new):
        (new / "of somebody").write_text("else")
    assert os.listdir(new) == ["of somebody"]


def test_a_disk_without_room_for_a_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(StoreFullError, match="No space left on device"):
        PageFile(tmp_path / "new", cell_nbytes=64, capacity_nbytes=1 << 20)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("folder", ["/proc/self", "/proc/nowhere/at/all", "a file", "a file/below"])
def test_refuses_where_it_cannot_write(tmp_path: Path, folder: str) -> None:
    (tmp_path / "a file").write_text("of somebody")
    with pytest.raises(StoreError, match="cannot make a file for KV pages in"):
        PageFile(tmp_path / folder, cell_nbytes=64, capacity_nbytes=1 << 20)
    assert os.listdir(tmp_path) == ["a file"]


@pytest.mark.parametrize(("cell", "capacity"), [(0, 1 << 20), (-64, 1 << 20), (4097, 8191), (64, 4095), (64, 0)])
def test_refuses_sizes_that_hold_no_cell(tmp_path: Path, cell: int, capacity: int) -> None:
    with pytest.raises(StoreError, match="raise kv_nvme"):
        PageFile(tmp_path, cell_nbytes=cell, capacity_nbytes=capacity)


def test_refuses_cells_of_another_store(tmp_path: Path) -> None:
    with page_file(tmp_path) as one, page_file(tmp_path) as other:
        run, data = put(one, 1)
        for call in (lambda: other.free(run, 0), lambda: other.read([CellRead(run, 0, 1, data)])):
            with pytest.raises(StoreError, match="another store"):
                call()


OTHER = """
import sys, torch
from tierstore.contracts import CellRead
from tierstore.stores.page_file import PageFile
store = PageFile(sys.argv[1], cell_nbytes=4096, capacity_nbytes=1 << 20)
data = torch.arange(8192).to(torch.uint8)
run = store.put(2, data)
run.fence.wait()
print("put", flush=True)
for line in sys.stdin:
    into = torch.zeros_like(data)
    store.read([CellRead(run, 0, 2, into)]).wait()
    print(torch.equal(into, data), flush=True)
"""


def test_processes_share_a_folder_and_leave_nothing_when_killed(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "put\n"
        with page_file(tmp_path) as store:
            assert lost(store, *put(store, 4)) == set()
            other.stdin.write("look\n")
            other.stdin.flush()
            assert other.stdout.readline() == "True\n"
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert os.listdir(tmp_path) == []
            assert lost(store, *put(store, 4)) == set()
