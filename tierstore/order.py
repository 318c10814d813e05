"""The cyclic order in which units are used: what comes next, and learning it when it was wrong."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice

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

        Expected is the unit at the cursor, or the unit of the visit before. After a miss the cursor
        stands just after the next occurrence of ``unit`` ahead, or where it was if there is none.
        """
        if unit == self._last:
            return True
        if len(self._record) < RECORD_LIMIT:
            self._record.append(unit)
        else:
            self._overflowed = True
        steps = self.distance(unit)
        # A cycle may end with the unit that begins it: when passes are not told apart, the two merge into one visit.
        wrapped = self._last is not None and self.distance(self._last) == 0
        self._last = unit
        expected = steps == 0 or (wrapped and steps == 1)
        if steps != sys.maxsize:
            self._cursor = (self._cursor + steps + 1) % len(self._sequence)
        self._missed = self._missed or not expected
        return expected

    def end_pass(self) -> bool:
        """A pass over the model ended; whether what it visited replaced the order.

        It does when a visit was a miss, or when the pass ended before the end of a cycle. A pass without visits,
        or one longer than ``RECORD_LIMIT`` visits, changes nothing. The cursor is at 0 afterwards.
        """
        wrong = self._missed or self._cursor != 0
        learnt = wrong and not self._overflowed and bool(self._record)
        if learnt:
            self._learn(self._record)
        else:
            self.drop_pass()
        return learnt

    def drop_pass(self) -> None:
        """Forget the pass so far, which broke off: nothing is learnt from it, the cursor goes to 0."""
        self._cursor = 0
        self._last = None
        self._record = []
        self._missed = False
        self._overflowed = False

    def upcoming(self) -> Iterator[str]:
        """The units expected next, in order: one full cycle from the cursor as it stands now."""
        return chain(islice(self._sequence, self._cursor, None), islice(self._sequence, self._cursor))

    def distance(self, unit: str) -> int:
        """Steps until the next expected use of ``unit``: 0 is next, ``sys.maxsize`` is never."""
        positions = self._positions.get(unit)
        if positions is None:
            return sys.maxsize
        index = bisect_left(positions, self._cursor)
        if index < len(positions):
            return positions[index] - self._cursor
        return positions[0] + len(self._sequence) - self._cursor

    def _learn(self, sequence: Sequence[str]) -> None:
        self._sequence = tuple(sequence)
        self._positions = {}
        for position, unit in enumerate(self._sequence):
            self._positions.setdefault(unit, []).append(position)
        self.drop_pass()
