"""What every ``Pool`` must do. Derive, override the ``make_pool`` fixture, and pytest runs the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.contracts import Lease, Pool
from tierstore.errors import SessionClosedError

MakePool = Callable[[int], Pool]


class OpenFence:
    """A fence that is complete when the test says so."""

    def __init__(self, *, complete: bool = False) -> None:
        self.complete = complete

    def done(self) -> bool:
        """What the test said last."""
        return self.complete

    def wait(self) -> None:
        """Would block for ever where nobody completes it, so it fails instead."""
        assert self.complete, "waited for a fence that nothing will complete"

    gate = wait


def tensor_of(lease: Lease) -> torch.Tensor:
    """The lease's buffer as what it must be: a tensor of bytes."""
    buffer = lease.buffer
    assert isinstance(buffer, torch.Tensor)
    assert buffer.dtype == torch.uint8
    assert buffer.shape == (lease.extent.nbytes,)
    assert buffer.is_contiguous()
    return buffer


class PoolContract:
    """Laws of ``Pool``."""

    @pytest.fixture
    def make_pool(self) -> Iterator[MakePool]:
        """Makes a pool of so many bytes; closes all of them after the test."""
        raise NotImplementedError("override make_pool")

    @pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 4095, 4096, 4097, 100_000])
    def test_holds_exactly_what_was_asked(self, make_pool: MakePool, nbytes: int) -> None:
        pool = make_pool(nbytes)
        assert pool.capacity == nbytes
        whole = pool.lease(nbytes)
        assert whole is not None
        assert tensor_of(whole).numel() == nbytes
        assert pool.lease(1) is None

    @pytest.mark.parametrize("align", [1, 2, 64, 256, 512, 4096])
    def test_addresses_are_aligned(self, make_pool: MakePool, align: int) -> None:
        pool = make_pool(1 << 16)
        for _ in range(4):
            lease = pool.lease(100, align=align)
            assert lease is not None
            assert tensor_of(lease).data_ptr() % align == 0

    @pytest.mark.parametrize("align", [0, 3, 8192, -64])
    def test_refuses_an_alignment_it_cannot_give(self, make_pool: MakePool, align: int) -> None:
        with pytest.raises(ValueError, match="power of two"):
            make_pool(1 << 16).lease(100, align=align)

    def test_empty_leases_always_fit(self, make_pool: MakePool) -> None:
        pool = make_pool(64)
        full = pool.lease(64)
        assert full is not None
        for _ in range(3):
            empty = pool.lease(0)
            assert empty is not None
            assert tensor_of(empty).numel() == 0
            empty.give_back(OpenFence())
        full.give_back(OpenFence(complete=True))

    def test_a_lease_ends_once(self, make_pool: MakePool) -> None:
        pool = make_pool(4096)
        lease = pool.lease(64)
        assert lease is not None
        lease.give_back(OpenFence(complete=True))
        with pytest.raises(ValueError):
            lease.give_back(OpenFence(complete=True))
        again = pool.lease(4096)
        assert again is not None
        assert pool.lease(64) is None

    def test_the_next_lease_of_the_bytes_comes_after_the_last(self, make_pool: MakePool) -> None:
        pool = make_pool(4096)
        left, right = pool.lease(2048), pool.lease(2048)
        assert left is not None
        assert right is not None
        ends = OpenFence(), OpenFence()
        left.give_back(ends[0])
        right.give_back(ends[1])
        middle = pool.lease(4096)
        assert middle is not None
        assert list(middle.after) == [*ends]
        middle.give_back(OpenFence(complete=True))  # never written: what came before it still counts
        ends[1].complete = True
        half = pool.lease(2048)
        assert half is not None
        assert list(half.after) == [ends[0]]
        other = pool.lease(2048)
        assert other is not None
        assert list(other.after) == []

    def test_complete_fences_are_dropped(self, make_pool: MakePool) -> None:
        pool = make_pool(4096)
        end = OpenFence()
        for _ in range(3):
            lease = pool.lease(4096)
            assert lease is not None
            assert list(lease.after) == []
            lease.give_back(end)
            end.complete = True

    def test_bytes_stay_with_their_lease(self, make_pool: MakePool) -> None:
        pool = make_pool(1 << 16)
        leases = [pool.lease(1000) for _ in range(8)]
        for value, lease in enumerate(leases):
            assert lease is not None
            tensor_of(lease).fill_(value)
        for value, lease in enumerate(leases):
            assert lease is not None
            assert bool((tensor_of(lease) == value).all())

    def test_live_leases_never_overlap(self, make_pool: MakePool) -> None:
        @settings(deadline=None, max_examples=30)
        @given(seed=st.integers(0, 2**32 - 1), alignment=st.sampled_from([64, 256, 4096]))
        def law(seed: int, alignment: int) -> None:
            _lease_and_give_back(make_pool(1 << 15), Random(seed), alignment)

        law()

    def test_memory_made_in_inference_mode_is_ordinary(self, make_pool: MakePool) -> None:
        with torch.inference_mode():
            lease = make_pool(4096).lease(64)
            assert lease is not None
            buffer = tensor_of(lease)
        buffer.fill_(1)
        assert not buffer.is_inference()

    def test_close_is_idempotent_and_ends_leasing(self, make_pool: MakePool) -> None:
        pool = make_pool(4096)
        lease = pool.lease(64)
        assert lease is not None
        pool.close()
        pool.close()
        with pytest.raises(SessionClosedError):
            pool.lease(64)
        lease.give_back(OpenFence())


def _lease_and_give_back(pool: Pool, random: Random, alignment: int) -> None:
    live: list[Lease] = []
    ended: list[tuple[Lease, OpenFence]] = []
    for _ in range(60):
        if live and random.random() < 0.45:
            lease = live.pop(random.randrange(len(live)))
            fence = OpenFence(complete=random.random() < 0.3)
            lease.give_back(fence)
            ended.append((lease, fence))
        elif (new := pool.lease(random.choice([0, 1, 64, 700, 5000]), align=alignment)) is not None:
            assert new.extent.end <= pool.capacity
            assert not any(new.extent.overlaps(other.extent) for other in live)
            expected = [fence for old, fence in ended if old.extent.overlaps(new.extent) and not fence.complete]
            assert list(new.after) == expected
            live.append(new)
        if ended and random.random() < 0.3:
            random.choice(ended)[1].complete = True
    for lease in live:
        lease.give_back(OpenFence(complete=True))
    assert pool.lease(pool.capacity) is not None, "bytes were lost"
