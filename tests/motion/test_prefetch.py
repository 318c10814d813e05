"""The prefetcher's promises, with a feed and fences that do exactly what a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tierstore.contracts import Fence, Lease
from tierstore.errors import CapacityError, SessionClosedError, StoreReadError
from tierstore.events import Event, Missed
from tierstore.ledger import Ledger
from tierstore.pools.host import HostPool
from tierstore.prefetch import Prefetcher
from tierstore.tensors import Block, Unit

NBYTES = 4096


class Switch:
    """A fence that is done when somebody waited for it, and remembers that; or that failed."""

    def __init__(self, error: Exception | None = None, *, done: bool = False) -> None:
        self.error = error
        self.over = done or error is not None
        self.waits = 0

    def done(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.waits += 1
        self.over = True
        if self.error is not None:
            raise self.error

    gate = wait


class Scripted:
    """A feed that notes what is brought; ``failing`` units fail until they are taken out."""

    def __init__(self) -> None:
        self.brought: list[str] = []
        self.fences: dict[str, Switch] = {}
        self.failing: set[str] = set()

    def slot_nbytes(self, unit: Unit) -> int:
        return unit.nbytes

    def offsets(self, unit: Unit) -> Mapping[str, int]:
        return {block.name: 0 for block in unit.blocks}

    def bring(self, unit: Unit, lease: Lease) -> Fence:
        self.brought.append(unit.name)
        error = StoreReadError("the disk is gone") if unit.name in self.failing else None
        fence = self.fences[unit.name] = Switch(error)
        return fence


class Bench:
    """A prefetcher over units ``a``, ``b``, ... of one page each, with room for ``slots`` of them."""

    def __init__(self, names: str, slots: int, *, residents: str = "") -> None:
        self.feed = Scripted()
        self.events: list[Event] = []
        self.marks: list[Switch] = []
        units = {name: Unit(name, (Block(name, NBYTES, 64, ()),)) for name in names}
        self.pool = HostPool(slots * NBYTES)
        self.stays = HostPool(max(len(residents), 1) * NBYTES)
        self.prefetcher = Prefetcher(
            units,
            names,
            residents,
            feed=self.feed,
            pools=dict.fromkeys(residents, self.stays),
            ledgers={name: Ledger(len(residents) * NBYTES, "hbm") for name in residents},
            ring=self.pool,
            ledger=Ledger(slots * NBYTES, "hbm"),
            mark=self._mark,
            recorder=self.events.append,
        )

    def _mark(self) -> Fence:
        self.marks.append(Switch())
        return self.marks[-1]

    def use(self, names: str) -> None:
        for name in names:
            self.prefetcher.acquire([name])
            self.prefetcher.release([name])

    @property
    def misses(self) -> int:
        return sum(isinstance(event, Missed) for event in self.events)


def test_what_comes_next_is_brought_before_it_is_asked_for() -> None:
    bench = Bench("abcdef", 3)
    bench.prefetcher.start()
    assert bench.feed.brought == list("abc")
    bench.use("a")
    assert bench.feed.brought == list("abcd")
    bench.use("bcdef" + "abcdef" * 3)
    assert bench.misses == 0
    # every unit crosses the link once a pass
    assert bench.feed.brought[: 4 * 6] == list("abcdef" * 4)


def test_residents_cross_once() -> None:
    bench = Bench("abcdef", 2, residents="ace")
    bench.prefetcher.start()
    bench.use("abcdef")
    bench.prefetcher.end_pass()
    for name in "ace":
        bench.prefetcher.resident(name)
    bench.prefetcher.settle()
    bench.use("bdf" * 3)
    for name in "ace":
        assert bench.feed.brought.count(name) == 1
    assert bench.misses == 0


def test_memory_is_given_back_with_the_end_of_every_use() -> None:
    """Two overlapping uses, ended by two threads' marks: both must be over before the slot is written again."""
    bench = Bench("ab", 1)
    bench.prefetcher.acquire(["a"])
    bench.prefetcher.acquire(["a"])
    bench.prefetcher.release(["a"])
    bench.prefetcher.release(["a"])
    lease = bench.prefetcher.acquire(["b"])[0]
    (over,) = lease.after
    assert not over.done()
    over.wait()
    assert [mark.waits for mark in bench.marks[:2]] == [1, 1]
    assert over.done()


def test_what_is_dropped_on_its_way_ends_before_its_memory_is_written_again() -> None:
    bench = Bench("abc", 1)
    bench.prefetcher.start()
    lease = bench.prefetcher.acquire(["c"])[0]
    (over,) = lease.after
    assert not over.done()
    over.wait()
    assert bench.feed.fences["a"].waits == 1


def test_borrowed_memory_is_free_of_earlier_users() -> None:
    bench = Bench("abc", 2)
    bench.prefetcher.start()
    assert bench.feed.brought == list("ab")
    lease = bench.prefetcher.borrow(NBYTES)  # b is dropped for it, still on its way
    assert lease is not None
    assert bench.feed.fences["b"].waits == 1
    bench.prefetcher.give_back(lease, NBYTES)
    assert bench.prefetcher.borrow(2 * NBYTES) is None  # what is needed next is not dropped


def test_an_early_transfer_that_failed_is_tried_again_when_it_is_needed() -> None:
    bench = Bench("abc", 3)
    bench.feed.failing = {"b"}
    bench.prefetcher.start()
    bench.feed.failing = set()
    bench.use("abc")
    assert bench.feed.brought == list("abcb")


def test_a_transfer_that_fails_when_needed_is_an_error_each_time_and_holds_nothing() -> None:
    bench = Bench("ab", 1)
    bench.feed.failing = {"a"}
    for _ in range(3):
        with pytest.raises(StoreReadError):
            bench.prefetcher.acquire(["a"])
    bench.feed.failing = set()
    bench.use("ab")


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_units_needed_together_come_together_or_not_at_all(names: str) -> None:
    bench = Bench("abcd", 2)
    bench.prefetcher.start()
    wanted: Sequence[str] = list(names)
    if len(names) > 2:
        with pytest.raises(CapacityError, match=r"raise Budget\.hbm by at least"):
            bench.prefetcher.acquire(wanted)
        bench.use("abcd")
    else:
        bench.prefetcher.acquire(wanted)
        with pytest.raises(CapacityError, match="in use"):
            bench.prefetcher.acquire(["c"])
        bench.prefetcher.release(wanted)


def test_a_spoiled_unit_is_brought_anew() -> None:
    bench = Bench("ab", 2)
    bench.use("a")
    bench.prefetcher.acquire(["a"])
    bench.prefetcher.spoil("a")
    bench.prefetcher.release(["a"])
    bench.use("a")
    assert bench.feed.brought.count("a") == 2


def test_after_close_nothing_is_brought() -> None:
    bench = Bench("ab", 1)
    bench.prefetcher.start()
    bench.prefetcher.close()
    bench.prefetcher.close()
    with pytest.raises(SessionClosedError):
        bench.prefetcher.acquire(["a"])
    assert bench.prefetcher.borrow(1) is None
    bench.prefetcher.release(["a"])


def test_no_lease_is_lost_when_a_feed_refuses() -> None:
    bench = Bench("ab", 1)
    whole: Any = bench.feed.bring

    def refuse(unit: Unit, lease: Lease) -> Fence:
        raise SessionClosedError("the feed is closed")

    bench.feed.bring = refuse  # type: ignore[method-assign]
    with pytest.raises(SessionClosedError):
        bench.prefetcher.acquire(["a"])
    bench.feed.bring = whole  # type: ignore[method-assign]
    bench.use("ab")
