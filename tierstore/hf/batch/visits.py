"""Which pages the tiles of a micro-batch read at once, block by block: integers only."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tierstore.hf.batch.stream import MicroBatch, Tile
from tierstore.kernels.paged_attention.tiles import BLOCK_TOKENS
from tierstore.pages import GONE

Pages = tuple[int, ...]
"""Those of a block, in order; ``GONE`` where none is read."""


@dataclass(frozen=True, slots=True)
class Look:
    """Tiles of ``queries`` queries look at their blocks number ``block``, which begin at page ``first`` of what a visit
    reads. ``shared``: all of them at the same one."""

    queries: int
    tiles: tuple[int, ...]
    block: int
    first: int
    shared: bool

    @property
    def blocks(self) -> int:
        """How many blocks are read."""
        return 1 if self.shared else len(self.tiles)


@dataclass(frozen=True)
class Visit:
    """Pages that are read at once, ``closed`` and ``unclosed``. ``places[i]`` says which of both stands at place ``i``
    of the blocks that ``looks`` are about; -1 where there is none."""

    looks: tuple[Look, ...]
    closed: tuple[int, ...]
    unclosed: tuple[int, ...]
    places: tuple[int, ...]

    @cached_property
    def pages(self) -> tuple[int, ...]:
        """All pages that are read, each once."""
        return self.closed + self.unclosed

    @cached_property
    def places_of(self) -> dict[int, list[int]]:
        """All places of each page."""
        found: dict[int, list[int]] = {page: [] for page in self.pages}
        for place, number in enumerate(self.places):
            if number >= 0:
                found[self.pages[number]].append(place)
        return found


class Spans:
    """The pages of the sequences in one micro-batch that some query sees there; ``tables`` are those of the slices."""

    def __init__(
        self, micro_batch: MicroBatch, tables: Sequence[Sequence[int]], page_tokens: int, window: int | None
    ) -> None:
        self._window, self._pages = window, BLOCK_TOKENS // page_tokens
        self._seen: dict[int, list[int]] = {}
        for part in micro_batch.parts:
            first = self.first_position(part.position) // page_tokens
            stop = (part.position + len(part.tokens) - 1) // page_tokens + 1
            pages = list(tables[part.slice][:stop])
            pages[:first] = [GONE] * first
            self._seen[part.slice] = pages + [GONE] * (-len(pages) % self._pages)

    def first_position(self, position: int) -> int:
        """The first position that a query sees."""
        return 0 if self._window is None else max(position - self._window + 1, 0)

    def blocks(self, tile: Tile) -> Iterator[tuple[int, Pages]]:
        """The blocks that a tile looks at, and their pages."""
        seen, size = self._seen[tile.slice], self._pages
        first = self.first_position(tile.position) // BLOCK_TOKENS
        last = (tile.position + tile.count - 1) // BLOCK_TOKENS
        return ((block, tuple(seen[block * size : (block + 1) * size])) for block in range(first, last + 1))


def plan_visits(
    tiles: Mapping[int, Sequence[Tile]], spans: Spans, unclosed: Container[int], *, most: int, few: int
) -> list[Visit]:
    """Visits of at most ``most`` blocks, looks of at most ``few``, that show each tile its blocks in ascending order.

    ``tiles`` are by their number of queries; tiles that look at the same pages look at one block."""
    blocks: dict[int, dict[tuple[int, Pages], list[int]]] = {}
    for queries, each in tiles.items():
        for number, tile in enumerate(each):
            for block, pages in spans.blocks(tile):
                blocks.setdefault(block, {}).setdefault((queries, pages), []).append(number)
    found: list[Visit] = []
    room: list[tuple[Look, list[Pages]]] = []
    used = 0
    for look, theirs in (each for block in sorted(blocks) for each in _looks(block, blocks[block], min(few, most))):
        if used + look.blocks > most:
            found.append(_visit(room, unclosed))
            room, used = [], 0
        room.append((look, theirs))
        used += look.blocks
    found.append(_visit(room, unclosed))
    return found


def _looks(
    block: int, groups: Mapping[tuple[int, Pages], Sequence[int]], few: int
) -> Iterator[tuple[Look, list[Pages]]]:
    """Tiles that share a block, then those that are alone with theirs, up to ``few`` at once."""
    alone: dict[int, list[tuple[int, Pages]]] = {}
    for (queries, pages), numbers in groups.items():
        if len(numbers) > 1:
            yield Look(queries, tuple(numbers), block, 0, shared=True), [pages]
        else:
            alone.setdefault(queries, []).append((numbers[0], pages))
    for queries, each in alone.items():
        for start in range(0, len(each), few):
            some = each[start : start + few]
            yield Look(queries, tuple(n for n, _ in some), block, 0, shared=False), [pages for _, pages in some]


def _visit(room: Iterable[tuple[Look, Sequence[Pages]]], unclosed: Container[int]) -> Visit:
    looks: list[Look] = []
    stand: list[int] = []
    for look, blocks in room:
        looks.append(Look(look.queries, look.tiles, look.block, len(stand), look.shared))
        stand += [page for pages in blocks for page in pages]
    pages = [page for page in dict.fromkeys(stand) if page != GONE]
    closed = tuple(page for page in pages if page not in unclosed)
    still = tuple(page for page in pages if page in unclosed)
    number = {page: at for at, page in enumerate(closed + still)}
    return Visit(tuple(looks), closed, still, tuple(number.get(page, -1) for page in stand))
