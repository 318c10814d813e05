"""Laws of the integer allocator."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from tierstore.arena import Arena
from tierstore.extents import Extent, align_up


class ArenaMachine(RuleBasedStateMachine):
    """An arena beside a bytearray that marks every byte which someone owns."""

    extents: Bundle[Extent] = Bundle("extents")

    @initialize(nbytes=st.integers(0, 5000), granularity=st.sampled_from([1, 8, 64, 256]))
    def start(self, nbytes: int, granularity: int) -> None:
        self.arena = Arena(nbytes, granularity)
        self.owned = bytearray(nbytes)
        self.live = 0

    @rule(target=extents, nbytes=st.integers(0, 700), align=st.sampled_from([1, 2, 64, 512]))
    def alloc(self, nbytes: int, align: int) -> Extent | MultipleResults[Extent]:
        extent = self.arena.alloc(nbytes, align)
        step = max(align, self.arena.granularity)
        if extent is None:
            # First fit fails only when no aligned place is free as a whole.
            places = range(0, len(self.owned) - nbytes + 1, step)
            assert all(any(self.owned[at : at + nbytes]) for at in places)
            return multiple()
        assert extent.nbytes == nbytes
        assert extent.offset % step == 0
        assert extent.end <= len(self.owned)
        assert not any(self.owned[extent.offset : extent.end])
        self.owned[extent.offset : extent.end] = b"\x01" * nbytes
        self.live += 1
        return extent

    @rule(extent=consumes(extents))
    def free(self, extent: Extent) -> None:
        self.arena.free(extent)
        self.owned[extent.offset : extent.end] = bytes(extent.nbytes)
        self.live -= 1
        if extent.nbytes:
            with pytest.raises(ValueError, match="not live"):
                self.arena.free(extent)

    @rule(extent=extents)
    def free_a_part(self, extent: Extent) -> None:
        if extent.nbytes > 1:
            with pytest.raises(ValueError, match="not live"):
                self.arena.free(Extent(extent.offset, extent.nbytes - 1))
            with pytest.raises(ValueError, match="not live"):
                self.arena.free(Extent(extent.offset + 1, extent.nbytes - 1))

    @invariant()
    def counts_hold(self) -> None:
        assert self.arena.live == self.live
        assert 0 <= self.arena.largest_gap <= self.arena.free_nbytes <= len(self.owned) - sum(self.owned)
        if self.arena.granularity == 1:
            assert self.arena.free_nbytes == len(self.owned) - sum(self.owned)
        if not any(self.owned):
            assert self.arena.largest_gap == self.arena.free_nbytes == len(self.owned)


TestArena = ArenaMachine.TestCase


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([1, 64, 4096])), max_size=40),
    random=st.randoms(use_true_random=False),
)
def test_everything_freed_is_one_gap_again(sizes: list[tuple[int, int]], random: Random) -> None:
    arena = Arena(65_537)
    extents = [extent for nbytes, align in sizes if (extent := arena.alloc(nbytes, align)) is not None]
    random.shuffle(extents)
    for extent in extents:
        arena.free(extent)
    assert arena.live == 0
    assert arena.largest_gap == arena.free_nbytes == 65_537
    assert arena.alloc(65_537) == Extent(0, 65_537)


@given(nbytes=st.integers(1, 10_000), size=st.integers(1, 3000))
def test_equal_sizes_fill_the_arena_without_waste(nbytes: int, size: int) -> None:
    arena = Arena(nbytes)
    count = 0
    while arena.alloc(size) is not None:
        count += 1
    step = align_up(size, 64)
    # The last extent may be cut short by the end of the arena, so that an exact fit is never refused.
    assert count == nbytes // step + (nbytes % step >= size)


def test_one_byte_more_than_the_gap_does_not_fit() -> None:
    arena = Arena(100, granularity=1)
    assert arena.alloc(101) is None
    assert arena.alloc(100) == Extent(0, 100)


def test_a_full_arena_still_gives_empty_extents() -> None:
    arena = Arena(0)
    first, second = arena.alloc(0), arena.alloc(0, 4096)
    assert first is not None
    assert second is not None
    assert arena.live == 2
    assert arena.alloc(1) is None
    arena.free(first)
    arena.free(second)
    with pytest.raises(ValueError, match="not live"):
        arena.free(first)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="nbytes"):
        Arena(-1)
    with pytest.raises(ValueError, match="granularity"):
        Arena(10, 0)
    with pytest.raises(ValueError, match="granularity"):
        Arena(10, 48)
    arena = Arena(10)
    with pytest.raises(ValueError, match="negative"):
        arena.alloc(-1)
    with pytest.raises(ValueError, match="align"):
        arena.alloc(1, 3)
    with pytest.raises(ValueError, match="not live"):
        arena.free(Extent(0, 10))
