"""The order in which layers read their pages, over and over: visits, counted from the start of the session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Item = tuple[int, tuple[int, ...]]
"""A layer and the pages that it reads."""


class VisitOrder:
    """Visit ``n`` is an item of the order; ``cursor`` is the visit that comes next."""

    def __init__(self) -> None:
        self.cursor = 0
        self._items: tuple[Item, ...] = ()
        self._origin = 0  # the visit of the first item

    def set(self, items: Sequence[Item]) -> bool:
        """From now on ``items``, the first one next; False when that is what was expected already."""
        same = (self.cursor - self._origin) % max(len(self._items), 1) == 0 and _equal(self._items, items)
        self._items = tuple(items)
        self._origin = self.cursor
        return not same

    @property
    def end(self) -> int:
        """The first visit that is a whole round ahead."""
        return self.cursor + len(self._items)

    def item(self, visit: int) -> Item:
        """What is read then."""
        return self._items[(visit - self._origin) % len(self._items)]

    def is_next(self, layer: int, pages: tuple[int, ...]) -> bool:
        """Whether ``layer`` is expected now, and reads at least what it was to read."""
        return bool(self._items) and self._is(self.cursor, layer, pages)

    def find(self, layer: int, pages: tuple[int, ...]) -> int | None:
        """The next visit that this can be."""
        return next((visit for visit in range(self.cursor, self.end) if self._is(visit, layer, pages)), None)

    def _is(self, visit: int, layer: int, pages: tuple[int, ...]) -> bool:
        expected_layer, expected = self.item(visit)
        return expected_layer == layer and (expected == pages[: len(expected)] or set(expected) <= set(pages))

    def renumber(self, visits: Iterable[tuple[int, int]]) -> Iterator[int]:
        """The visits of this order that ``(visit, layer)``, ascending visits of an earlier one, stand for; ends where
        there is none."""
        new, last, known = self.cursor - 1, -1, False
        for visit, layer in visits:
            if not known or visit != last:
                new = next((later for later in range(new + 1, self.end) if self.item(later)[0] == layer), -1)
                last, known = visit, True
            if new < 0:
                return
            yield new


def _equal(some: Sequence[Item], others: Sequence[Item]) -> bool:
    """``some == others``, without comparing long tuples again that many items share."""
    known: tuple[object, object] = (None, None)
    for (layer, pages), (other_layer, other_pages) in zip(some, others, strict=False):
        if layer != other_layer:
            return False
        if pages is other_pages or (pages is known[0] and other_pages is known[1]):
            continue
        if pages != other_pages:
            return False
        known = pages, other_pages
    return len(some) == len(others)
