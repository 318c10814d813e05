"""Disk to device in one hop: the logic against a stand-in for kvikio, the real thing where there is one."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tierstore.contracts import Fence, ReadRequest
from tierstore.copies.gds import PAGE, GdsReads
from tierstore.errors import DeviceError, SessionClosedError, StoreError, StoreReadError
from tierstore.events import Event, Moved
from tierstore.extents import Extent
from tierstore.feeds.gds import GdsFeed
from tierstore.pools.host import HostPool
from tierstore.tensors import Block, Piece, Unit
from tierstore.testing.copy_engine_contract import HostFence, noise
from tierstore.testing.pool_contract import tensor_of

CONTENT = noise(5 * PAGE + 1234, seed=4)


class FakeFuture:
    """Gives its result once, as C++ futures do, and never says whether it is ready."""

    def __init__(self, result: Callable[[], int]) -> None:
        self._result: Callable[[], int] | None = result

    def get(self) -> int:
        assert self._result is not None, "a future was asked twice"
        result, self._result = self._result, None
        return result()

    def done(self) -> bool:
        return True


class FakeKvikio(ModuleType):
    """kvikio over host memory; ``calls`` are the (offset, size, address) of its reads."""

    def __init__(self) -> None:
        super().__init__("kvikio")
        self.calls: list[tuple[int, int, int]] = []
        self.open_files = 0
        self.registered: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.break_read: Callable[[int], int] = lambda size: size
        self.break_pread: Exception | None = None
        fake = self

        class CuFile:
            def __init__(self, path: Path, flags: str) -> None:
                assert flags == "r"
                self._bytes = path.read_bytes()
                fake.open_files += 1

            def pread(self, buffer: torch.Tensor, size: int, file_offset: int) -> FakeFuture:
                if fake.break_pread:
                    raise fake.break_pread
                assert size == buffer.numel()
                fake.calls.append((file_offset, size, buffer.data_ptr()))
                data = self._bytes[file_offset : file_offset + size]

                def result() -> int:
                    assert fake.go.wait(timeout=20)
                    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    return fake.break_read(len(data))

                return FakeFuture(result)

            def close(self) -> None:
                fake.open_files -= 1

        self.CuFile = CuFile
        self.buffer = ModuleType("kvikio.buffer")
        self.buffer.memory_register = lambda memory: self.registered.append(memory.data_ptr())  # type: ignore[attr-defined]
        self.buffer.memory_deregister = lambda memory: self.registered.remove(memory.data_ptr())  # type: ignore[attr-defined]


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    fake = FakeKvikio()
    monkeypatch.setitem(sys.modules, "kvikio", fake)
    monkeypatch.setitem(sys.modules, "kvikio.buffer", fake.buffer)
    return fake


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT.numpy().tobytes())
    return path


@pytest.mark.parametrize("shift", [0, 100])
@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 5 * PAGE), (100, 3 * PAGE), (4000, 200), (PAGE, PAGE), (PAGE - 1, 2 * PAGE + 2), (7, 0)]
)
def test_whole_pages_are_read_as_such(kvikio: FakeKvikio, file: Path, offset: int, nbytes: int, shift: int) -> None:
    pool = HostPool(8 * PAGE)
    lease = pool.lease(8 * PAGE)
    assert lease is not None
    at = offset % PAGE + shift
    into = tensor_of(lease)[at : at + nbytes]
    with closing(GdsReads([file])) as reads:
        fence = reads.read([ReadRequest(0, Extent(offset, nbytes), into)])
        fence.wait()
        assert fence.done()
        assert 0 < fence.started <= fence.finished
    assert torch.equal(into, CONTENT[offset : offset + nbytes])
    assert sum(size for _, size, _ in kvikio.calls) == nbytes
    if shift == 0:
        pages = [call for call in kvikio.calls if call[1] >= PAGE]
        assert all(call[0] % PAGE == call[1] % PAGE == call[2] % PAGE == 0 for call in pages)
    assert kvikio.open_files == 0
    assert kvikio.registered == []


def test_memory_is_registered_once(kvikio: FakeKvikio, file: Path) -> None:
    into = torch.zeros(2 * PAGE, dtype=torch.uint8)
    with closing(GdsReads([file])) as reads:
        for at in (0, PAGE):
            reads.read([ReadRequest(0, Extent(at, PAGE), into[at : at + PAGE])]).wait()
        assert len(kvikio.registered) == 1
    assert torch.equal(into, CONTENT[: 2 * PAGE])


@pytest.mark.parametrize("error", [None, RuntimeError("device went away"), OSError(5, "I/O error"), ValueError("no")])
def test_a_read_that_fails_comes_out_of_its_fence(kvikio: FakeKvikio, file: Path, error: Exception | None) -> None:
    """Of whatever kind kvikio's error is; without one it came up short."""

    def failing(size: int) -> int:
        if error is not None:
            raise error
        return size - 1

    kvikio.break_read = failing
    into = torch.zeros(PAGE, dtype=torch.uint8)
    with closing(GdsReads([file])) as reads:
        fence = reads.read([ReadRequest(0, Extent(0, PAGE), into)])
        for ask in (fence.wait, fence.gate):
            with pytest.raises(StoreReadError, match="wanted 4096 bytes"):
                ask()
        assert fence.done()
        kvikio.break_read = lambda size: size
        reads.read([ReadRequest(0, Extent(0, PAGE), into)]).wait()
        kvikio.break_pread = error or RuntimeError("no slots left")
        with pytest.raises(StoreReadError, match=re.escape(f"refused a read: {kvikio.break_pread}")):
            reads.read([ReadRequest(0, Extent(0, PAGE), into)])


def test_close_waits_for_what_is_under_way(kvikio: FakeKvikio, file: Path) -> None:
    kvikio.go.clear()
    reads, into = GdsReads([file]), torch.zeros(PAGE, dtype=torch.uint8)
    fence = reads.read([ReadRequest(0, Extent(0, PAGE), into)])
    assert not fence.done()
    closer = threading.Thread(target=reads.close)
    closer.start()
    assert closer.is_alive()
    assert kvikio.open_files == 1
    kvikio.go.set()
    closer.join(timeout=20)
    assert fence.done()
    assert kvikio.open_files == 0
    reads.close()
    with pytest.raises(StoreError, match="closed"):
        reads.read([])


def test_a_file_that_is_missing_is_named(kvikio: FakeKvikio, file: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        GdsReads([file, file.with_name("nowhere")])
    assert kvikio.open_files == 0


def test_without_kvikio_the_next_step_is_said(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(DeviceError, match="pip install"):
        GdsReads([file])


def whole_file() -> Unit:
    blocks = ((0, 5000), (5000, 8000), (13_100, CONTENT.numel() - 13_100))
    return Unit("u", tuple(Block(f"b{at}", n, 64, (Piece(0, Extent(at, n)),)) for at, n in blocks))


def test_feed_waits_for_earlier_users_without_blocking(kvikio: FakeKvikio, file: Path) -> None:
    unit, events, pool = whole_file(), list[Event](), HostPool(1 << 16)
    with closing(GdsReads([file])) as reads, closing(GdsFeed(reads, events.append)) as feed:
        user = HostFence()
        first = pool.lease(feed.slot_nbytes(unit), align=PAGE)
        assert first is not None
        first.give_back(user)
        lease = pool.lease(feed.slot_nbytes(unit), align=PAGE)
        assert lease is not None
        assert list(lease.after) == [user]
        fence = feed.bring(unit, lease)
        assert not fence.done()
        assert kvikio.calls == []
        user.complete()
        fence.wait()
        for block in unit.blocks:
            at, extent = feed.offsets(unit)[block.name], block.pieces[0].extent
            assert at % 64 == 0
            assert torch.equal(tensor_of(lease)[at : at + block.nbytes], CONTENT[extent.offset : extent.end])
    assert [(e.link, e.nbytes) for e in events if isinstance(e, Moved)] == [("nvme->hbm", unit.nbytes)]
    pool.close()


class Refusing:
    """Reads that fail at once."""

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        raise StoreReadError("not today")


def test_feed_tells_of_errors_and_goes_on() -> None:
    unit, events, pool = whole_file(), list[Event](), HostPool(1 << 17)
    feed = GdsFeed(Refusing(), events.append)
    leases = [pool.lease(feed.slot_nbytes(unit), align=PAGE) for _ in range(3)]
    for lease in leases[:2]:
        assert lease is not None
        with pytest.raises(StoreReadError, match="not today"):
            feed.bring(unit, lease).wait()
    feed.close()
    feed.close()
    assert events == []
    assert leases[2] is not None
    with pytest.raises(SessionClosedError):
        feed.bring(unit, leases[2])
    pool.close()


@pytest.mark.gds
def test_real_reads_are_exact(tmp_path: Path) -> None:
    from tierstore.pools.cuda import CudaPool

    content = noise(64 << 20)
    path = tmp_path / "weights"
    path.write_bytes(content.numpy().tobytes())
    pool, events = CudaPool(80 << 20, torch.device("cuda")), list[Event]()
    unit = Unit(
        "u", tuple(Block(str(n), 8_000_000, 64, (Piece(0, Extent(300 + 8_000_000 * n, 8_000_000)),)) for n in range(8))
    )
    with closing(GdsReads([path])) as reads, closing(GdsFeed(reads, events.append)) as feed:
        lease = pool.lease(feed.slot_nbytes(unit), align=PAGE)
        assert lease is not None
        for _ in range(2):
            feed.bring(unit, lease).gate()
            for block in unit.blocks:
                at, extent = feed.offsets(unit)[block.name], block.pieces[0].extent
                there = tensor_of(lease)[at : at + block.nbytes]
                assert there.is_cuda
                assert torch.equal(there.cpu(), content[extent.offset : extent.end])
            tensor_of(lease).zero_()
            torch.cuda.synchronize()
    pool.close()
