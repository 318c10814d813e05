"""Copy engines, by the contract and by what is their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from threading import Thread

import pytest
import torch

from tierstore.contracts import CopyEngine
from tierstore.copies.cpu import DONE, CpuCopyEngine
from tierstore.copies.cuda import SEGMENT_NBYTES, CudaCopyEngine, within_segments
from tierstore.errors import DeviceError
from tierstore.pools.cuda import CudaPool, CudaRegistrar
from tierstore.pools.host import HostPool
from tierstore.testing.adversary import AdversaryEngine
from tierstore.testing.copy_engine_contract import CopyEngineContract, noise
from tierstore.testing.pool_contract import tensor_of

CUDA = torch.device("cuda")


class TestCpuCopyEngine(CopyEngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[CopyEngine]:
        with closing(CpuCopyEngine()) as engine:
            yield engine


@pytest.mark.parametrize("seed", range(5))
class TestAdversaryEngine(CopyEngineContract):
    @pytest.fixture
    def engine(self, seed: int) -> Iterator[CopyEngine]:
        with closing(AdversaryEngine(seed)) as engine:
            yield engine
            engine.check()


@pytest.mark.cuda
class TestCudaCopyEngine(CopyEngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[CopyEngine]:
        with closing(CudaCopyEngine(CUDA)) as engine:
            yield engine

    @pytest.fixture
    def device(self) -> torch.device:
        return CUDA


def test_cpu_copies_need_no_fence() -> None:
    engine = CpuCopyEngine()
    assert engine.unified
    to = torch.zeros(5, dtype=torch.uint8)
    assert engine.copy([(torch.ones(5, dtype=torch.uint8), to)]) is DONE
    assert bool(to.all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_a_named_error() -> None:
    with pytest.raises(DeviceError, match="device='cpu'"):
        CudaCopyEngine(CUDA)
    with pytest.raises(DeviceError, match="device='cpu'"):
        CudaPool(64, CUDA)


def test_copies_keep_within_pinned_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver takes no copy that leaves the range it begins in."""
    assert CudaRegistrar.segment_nbytes == SEGMENT_NBYTES
    monkeypatch.setattr("tierstore.copies.cuda.SEGMENT_NBYTES", 4096)
    pool = HostPool(64 << 10)
    lease = pool.lease(64 << 10)
    assert lease is not None
    host = tensor_of(lease)
    for start, nbytes in [(0, 4096), (100, 3996), (4095, 2), (5, 30_000), (0, 64 << 10), (8192, 0)]:
        src, dst = host[start : start + nbytes], torch.zeros(nbytes, dtype=torch.uint8)
        for down in (False, True):
            pieces = list(within_segments(*((dst, src, True) if down else (src, dst, False))))
            sides = [piece[1 if down else 0] for piece in pieces]
            assert sum(side.numel() for side in sides) == nbytes
            assert all(side.data_ptr() // 4096 == (side.data_ptr() + side.numel() - 1) // 4096 for side in sides)
            assert all(a.numel() == b.numel() for a, b in pieces)
        src.copy_(noise(nbytes))
        for source, target in within_segments(src, dst, False):
            target.copy_(source)
        assert torch.equal(src, dst)
    assert len(list(within_segments(host[:4096], torch.zeros(4096, dtype=torch.uint8), False))) == 1
    pool.close()


@pytest.mark.cuda
def test_pinned_memory_in_segments_is_copied_exactly() -> None:
    """Across the border of two registrations, both ways, and what the driver says about each byte."""
    nbytes = SEGMENT_NBYTES + (8 << 20)
    host, device = HostPool(nbytes, registrar=CudaRegistrar()), CudaPool(nbytes, CUDA)
    with closing(CudaCopyEngine(CUDA)) as engine:
        whole, there, back = host.lease(nbytes), device.lease(nbytes), torch.zeros(nbytes, dtype=torch.uint8)
        assert whole is not None
        assert there is not None
        source = tensor_of(whole)
        source.copy_(noise(nbytes))
        assert host.notes == []
        assert host.is_pinned(whole.extent)
        assert source[:4096].is_pinned()
        assert source[-4096:].is_pinned()
        up = engine.copy([(source, tensor_of(there))], after=there.after)
        engine.copy([(tensor_of(there), back)], after=[up]).wait()
        assert torch.equal(back, source)
    device.close()
    host.close()
    assert not source[:4096].is_pinned()


@pytest.mark.cuda
def test_a_refused_registration_leaves_no_error_behind() -> None:
    """The same pages twice: the second is refused, and the next kernel must not be blamed for it."""
    registrar, pool = CudaRegistrar(), HostPool(1 << 20)
    lease = pool.lease(1 << 20)
    assert lease is not None
    address = tensor_of(lease).data_ptr()
    assert registrar.register(address, 1 << 20)
    assert not registrar.register(address, 1 << 20)
    assert int(torch.ones(8, device=CUDA).sum()) == 8
    registrar.unregister(address)
    registrar.unregister(address)
    assert int(torch.ones(8, device=CUDA).sum()) == 8
    pool.close()


@pytest.mark.cuda
def test_the_host_does_not_wait_for_a_copy_behind_slow_compute() -> None:
    """`after` is the stream's business: a copy behind compute is issued at once, and done only when that is."""
    with closing(CudaCopyEngine(CUDA)) as engine:
        slot = torch.zeros(1 << 20, dtype=torch.uint8, device=CUDA)
        torch.cuda._sleep(1 << 30)  # type: ignore[no-untyped-call]
        mark = engine.mark()
        fence = engine.copy([(torch.ones(1 << 20, dtype=torch.uint8).pin_memory(), slot)], after=[mark])
        assert not mark.done()
        assert not fence.done()
        fence.gate()
        total = slot.int().sum()
        assert not fence.done()
        assert int(total) == 1 << 20
        assert fence.done()


@pytest.mark.cuda
def test_copies_know_when_they_ran() -> None:
    from time import perf_counter

    host = torch.ones(256 << 20, dtype=torch.uint8).pin_memory()
    with closing(CudaCopyEngine(CUDA)) as engine:
        there = torch.zeros(256 << 20, dtype=torch.uint8, device=CUDA)
        engine.copy([(host, there)], after=[engine.mark()]).wait()
        before = perf_counter()
        fence = engine.copy([(host, there)])
        fence.wait()
        after = perf_counter()
        started, finished = getattr(fence, "started"), getattr(fence, "finished")  # noqa: B009
        assert before - 1e-2 < started < finished < after + 1e-2
        assert finished - started < after - before + 1e-4


@pytest.mark.cuda
def test_up_and_down_in_one_call_are_refused() -> None:
    with closing(CudaCopyEngine(CUDA)) as engine:
        host, there = torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8, device=CUDA)
        for pairs in ([(host, there), (there, host)], [(host, host)], [(there, there)]):
            with pytest.raises(ValueError, match="two calls"):
                engine.copy(pairs)


@pytest.mark.cuda
def test_threads_share_the_engine() -> None:
    failures: list[BaseException] = []
    with closing(CudaCopyEngine(CUDA)) as engine:

        def work(seed: int) -> None:
            try:
                from random import Random

                from tierstore.testing.copy_engine_contract import stream_pages

                stream = torch.cuda.Stream(CUDA)  # type: ignore[no-untyped-call]
                with torch.cuda.stream(stream):
                    stream_pages(engine, CUDA, Random(seed))
            except BaseException as error:
                failures.append(error)

        threads = [Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert failures == []
