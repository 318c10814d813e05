"""The cyclic order in which units are used: what comes next, and learning it when it was wrong."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice

WINDOW = 8
"""How many steps ahead of the cursor (and below half a cycle) a visit still counts as the same stretch, reordered."""

PATIENCE = 4
"""How many visits out of turn the cursor waits for the unit it expects, before it goes past them."""

RECORD_LIMIT = 1_000_000
"""Visits kept of one pass; a longer pass is followed but not learnt."""


class Order:
    """The units of one pass over a model, in order of use, repeated for ever, with a cursor.

    Visits of one unit in a row count as one visit, so ``sequence`` is merged likewise. A pass
    begins at cursor 0. The cursor stands before the unit that is expected next.
    """

    def __init__(self, sequence: Sequence[str]) -> None:
        self._sequence: tuple[str, ...] = ()
        self._positions: dict[str, list[int]] = {}
        self._cursor = 0
        self._seen: set[int] = set()  # positions ahead of the cursor that were visited out of turn
        self._last: str | None = None
        self._record: list[str] = []
        self._missed = False
        self._overflowed = False
        self._learn([unit for unit, _ in groupby(sequence)])

    @property
    def sequence(self) -> tuple[str, ...]:
        """One cycle, merged."""
        return self._sequence

    @property
    def cursor(self) -> int:
        """Index into ``sequence`` of the unit expected next."""
        return self._cursor

    def visit(self, unit: str) -> bool:
        """Note that ``unit`` is used now; whether that was expected.

        Expected is the unit at the cursor, or the unit of the visit before. A visit a few steps ahead is
        out of turn: the cursor waits for the unit it stands at, up to ``PATIENCE`` such visits. After a
        visit farther ahead, or when patience ends, the cursor stands just after what was visited.
        """
        if unit == self._last:
            return True
        if len(self._record) < RECORD_LIMIT:
            self._record.append(unit)
        else:
            self._overflowed = True
        steps = self.distance(unit)
        # A cycle may end with the unit that begins it: when passes are not told apart, the two merge into one visit.
        wrapped = self._last is not None and steps == 1 and self.distance(self._last) == 0
        self._last = unit
        expected = steps == 0 or wrapped
        if expected:
            self._go(steps + 1)
        elif steps != sys.maxsize:
            self._out_of_turn(steps)
        self._missed = self._missed or not expected
        return expected

    def end_pass(self) -> bool:
        """A pass over the model ended; whether what it visited replaced the order.

        It does when a visit was a miss, or when the pass ended before the end of a cycle. A pass without visits,
        or one longer than ``RECORD_LIMIT`` visits, changes nothing. The cursor is at 0 afterwards.
        """
        wrong = self._missed or self._cursor != 0 or bool(self._seen)
        learnt = wrong and not self._overflowed and bool(self._record)
        if learnt:
            self._learn(self._record)
        else:
            self.drop_pass()
        return learnt

    def drop_pass(self) -> None:
        """Forget the pass so far, which broke off: nothing is learnt from it, the cursor goes to 0."""
        self._cursor = 0
        self._seen.clear()
        self._last = None
        self._record = []
        self._missed = False
        self._overflowed = False

    def upcoming(self) -> Iterator[str]:
        """The units expected next, in order: one full cycle from the cursor as it stands now."""
        cycle = chain(range(self._cursor, len(self._sequence)), range(self._cursor))
        return (self._sequence[position] for position in cycle if position not in self._seen)

    def distance(self, unit: str) -> int:
        """Steps until the next expected use of ``unit``: 0 is next, ``sys.maxsize`` is never."""
        positions = self._positions.get(unit)
        if positions is None:
            return sys.maxsize
        first = bisect_left(positions, self._cursor)
        for position in chain(islice(positions, first, None), islice(positions, first)):
            if position not in self._seen:
                return (position - self._cursor) % len(self._sequence)
        return len(self._sequence) + (positions[first % len(positions)] - self._cursor) % len(self._sequence)

    def _out_of_turn(self, steps: int) -> None:
        position = (self._cursor + steps) % len(self._sequence)
        if steps < min(WINDOW, len(self._sequence) // 2) and len(self._seen) < PATIENCE:
            self._seen.add(position)
        else:
            farthest = max([steps, *((p - self._cursor) % len(self._sequence) for p in self._seen)])
            self._seen.clear()
            self._go(farthest + 1)

    def _go(self, steps: int) -> None:
        """Move the cursor ahead, and past what was visited out of turn."""
        for _ in range(steps):
            self._seen.discard(self._cursor)
            self._cursor = (self._cursor + 1) % len(self._sequence)
        while self._cursor in self._seen:
            self._seen.discard(self._cursor)
            self._cursor = (self._cursor + 1) % len(self._sequence)

    def _learn(self, sequence: Sequence[str]) -> None:
        self._sequence = tuple(sequence)
        self._positions = {}
        for position, unit in enumerate(self._sequence):
            self._positions.setdefault(unit, []).append(position)
        self.drop_pass()
