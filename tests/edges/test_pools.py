"""Host, poison and CUDA pools, by the contract and by what is their own."""

from __future__ import annotations

import mmap
import resource
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch

from tierstore.contracts import Pool
from tierstore.copies.cpu import DONE
from tierstore.errors import BudgetError, CapacityError
from tierstore.extents import Extent
from tierstore.pools.host import HostPool
from tierstore.testing.adversary import AdversaryEngine
from tierstore.testing.poison import POISON, PoisonPool
from tierstore.testing.pool_contract import MakePool, OpenFence, PoolContract, tensor_of

PAGE = mmap.PAGESIZE


def closing(make: Callable[[int], Pool]) -> Iterator[MakePool]:
    pools: list[Pool] = []

    def made(nbytes: int) -> Pool:
        pools.append(make(nbytes))
        return pools[-1]

    yield made
    for pool in pools:
        pool.close()


class FakeDriver:
    """A ``Registrar`` that pins up to ``limit`` bytes and knows what it pinned."""

    segment_nbytes = 4 * PAGE

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit = limit
        self.pinned: dict[int, int] = {}
        self.asked = 0

    def register(self, address: int, nbytes: int) -> bool:
        self.asked += 1
        assert address % PAGE == 0
        assert nbytes % PAGE == 0
        assert nbytes > 0
        assert address // self.segment_nbytes == (address + nbytes - 1) // self.segment_nbytes
        if sum(self.pinned.values()) + nbytes > self.limit:
            return False
        self.pinned[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        del self.pinned[address]


class TestHostPool(PoolContract):
    @pytest.fixture
    def make_pool(self) -> Iterator[MakePool]:
        yield from closing(HostPool)


class TestPinnedHostPool(PoolContract):
    @pytest.fixture
    def make_pool(self) -> Iterator[MakePool]:
        driver = FakeDriver()
        yield from closing(lambda nbytes: HostPool(nbytes, registrar=driver))
        assert not driver.pinned


class TestPoisonPool(PoolContract):
    @pytest.fixture
    def make_pool(self) -> Iterator[MakePool]:
        engine = AdversaryEngine(0)
        yield from closing(lambda nbytes: PoisonPool(nbytes, engine))


@pytest.mark.cuda
class TestCudaPool(PoolContract):
    @pytest.fixture
    def make_pool(self) -> Iterator[MakePool]:
        from tierstore.pools.cuda import CudaPool

        yield from closing(lambda nbytes: CudaPool(nbytes, torch.device("cuda")))


def resident_nbytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_memory_costs_nothing_until_written_and_goes_with_the_pool() -> None:
    nbytes = 256 << 20
    before = resident_nbytes()
    pool = HostPool(nbytes)
    lease = pool.lease(nbytes)
    assert lease is not None
    assert resident_nbytes() - before < nbytes // 4
    tensor_of(lease).fill_(1)
    assert nbytes <= resident_nbytes() - before + (16 << 20)
    assert resident_nbytes() - before < nbytes + (16 << 20)  # never a power of two above it
    pool.close()
    del lease
    assert resident_nbytes() - before < nbytes // 4


def test_a_view_outlives_its_pool() -> None:
    pool = HostPool(PAGE)
    lease = pool.lease(PAGE)
    assert lease is not None
    view = tensor_of(lease)
    view.fill_(7)
    pool.close()
    assert bool((view == 7).all())


def test_segments_are_pinned_when_first_used() -> None:
    driver = FakeDriver()
    pool = HostPool(64 * PAGE, registrar=driver)
    first = pool.lease(100)
    assert first is not None
    assert driver.pinned == {}
    assert tensor_of(first).numel() == 100
    assert pool.is_pinned(first.extent)
    assert not pool.is_pinned(Extent(0, 64 * PAGE))
    assert 0 < pool.pinned_nbytes <= 4 * PAGE
    asked = driver.asked
    first.give_back(DONE)
    again, rest = pool.lease(100), pool.lease(63 * PAGE)
    assert again is not None
    assert rest is not None
    assert tensor_of(again).numel() == 100
    assert driver.asked == asked
    assert tensor_of(rest).numel() == 63 * PAGE
    assert pool.is_pinned(Extent(0, 64 * PAGE))
    assert pool.pinned_nbytes == 64 * PAGE == sum(driver.pinned.values())
    assert pool.notes == []
    pool.close()
    pool.close()
    assert driver.pinned == {}
    assert pool.pinned_nbytes == 0


def test_what_the_driver_refuses_stays_pageable_and_is_said_once() -> None:
    driver = FakeDriver(limit=8 * PAGE)
    pool = HostPool(64 * PAGE, registrar=driver)
    lease = pool.lease(64 * PAGE)
    assert lease is not None
    tensor_of(lease).fill_(3)
    assert 0 < pool.pinned_nbytes <= 8 * PAGE
    assert pool.is_pinned(Extent(0, PAGE))
    assert not pool.is_pinned(Extent(32 * PAGE, PAGE))
    lease.give_back(DONE)
    asked = driver.asked
    again = pool.lease(64 * PAGE)
    assert again is not None
    assert tensor_of(again).numel() == 64 * PAGE
    assert driver.asked == asked
    assert len(pool.notes) == 1
    assert "pageable" in pool.notes[0]
    pool.close()
    assert driver.pinned == {}


def test_without_a_driver_nothing_is_pinned() -> None:
    pool = HostPool(PAGE)
    assert not pool.is_pinned(Extent(0, PAGE))
    assert pool.pinned_nbytes == 0
    pool.close()


def test_refuses_a_negative_size() -> None:
    with pytest.raises(BudgetError, match="-1"):
        HostPool(-1)


def test_says_what_the_system_refuses() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (256 << 20), hard))
    try:
        with pytest.raises(CapacityError, match="lower Budget"):
            HostPool(1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_slot_is_poison_from_the_moment_it_is_given_back() -> None:
    pool = PoisonPool(4096, AdversaryEngine(0))
    lease = pool.lease(4096)
    assert lease is not None
    view = lease.buffer
    assert bool((view == POISON).all())
    view.fill_(1)
    lease.give_back(DONE)
    assert bool((view == POISON).all())
    with pytest.raises(ValueError):
        lease.give_back(OpenFence())
    pool.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_poison_is_not_a_number(dtype: torch.dtype) -> None:
    assert bool(torch.full((16,), POISON, dtype=torch.uint8).view(dtype).float().isnan().all())


@pytest.mark.cuda
def test_more_than_the_gpu_has_is_refused() -> None:
    from tierstore.pools.cuda import CudaPool

    with pytest.raises(CapacityError, match=r"Budget\.hbm"):
        CudaPool(1 << 50, torch.device("cuda"))
