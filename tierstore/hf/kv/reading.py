"""Reading a layer's pages: whole, in the order of the batch's columns, or a group of pages at a time for its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from tierstore.hf.kv.gathering import blocks_of, copy_scattered
from tierstore.hf.kv.passes import KindPass
from tierstore.hf.kv.room import Room, States
from tierstore.hf.kv.runs import take
from tierstore.page_kinds import FRAME_ALIGN
from tierstore.paging.waves import Wave

Known = dict[int, tuple[Wave, list[int]]]
"""Of each layer the last wave of pages in HBM, and their frames."""


@dataclass(frozen=True)
class Places:
    """Where the bytes of pages are: pieces of ``piece_tokens`` tokens at bytes ``keys[i]`` and ``values[i]`` of
    ``buffer`` for page i; a packed page is one piece, whose keys and values start with it."""

    buffer: Tensor
    keys: Sequence[Sequence[int]]
    values: Sequence[Sequence[int]]
    piece_tokens: int


@dataclass(frozen=True)
class Source:
    """Pages that can be read now: ``take`` gives keys [n, page_tokens, heads, key_dim] and values of those at some
    places in ``pages``, in the dtype of a room and mostly in its memory.

    ``packed`` pages come as their format keeps them. With ``whole``, page i is entry ``at[i]`` of these views.
    """

    pages: tuple[int, ...]
    take: Callable[[Sequence[int], Room], States]
    places: Callable[[], Places]
    packed: bool = False
    whole: States | None = None
    at: Sequence[int] = ()


@dataclass(frozen=True)
class Group:
    """Pages of some ``rows``: keys [S, heads, N, key_dim] and values, where S is 1 if all rows share them.

    ``indices[s]`` are the page indices, so that the key at ``i`` is position
    ``indices[s][i // page_tokens] * page_tokens + i % page_tokens``.
    """

    rows: tuple[int, ...]
    indices: tuple[tuple[int, ...], ...]
    keys: Tensor
    values: Tensor
    packed: bool


class Reader:
    """Reads the pages of one kind in one pass."""

    def __init__(self, passing: KindPass, known: Known) -> None:
        self._pass = passing
        self._kind = passing.kind
        self._known = known
        self._cells = passing.kind.cells
        self._index_of: dict[int, int] = {}  # of a page in its rows
        self._rows_of: dict[int, tuple[int, ...]] = {}

    def sources(self, layer: int) -> Iterator[Source]:
        """All pages of the pass, each in one source. A step on says that compute on the last source was issued."""
        pager, cells = self._kind.pager, self._cells
        unclosed = [page for page in self._pass.unclosed if pager.is_open(layer, page)]
        closed = self._pass.closed
        if len(unclosed) < len(self._pass.unclosed):
            closed += tuple(page for page in self._pass.unclosed if page not in unclosed)
        waves = pager.waves(layer, closed) if closed else iter(())
        frames = {page: pager.frames(layer, page) for page in unclosed}
        wave = next(waves, None)
        if self._kind.plan.kind.plain:
            if wave is not None and cast(Tensor, wave.buffer).data_ptr() == cells.region.data_ptr():
                yield self._in_region(layer, wave, frames)
                wave = next(waves, None)
            elif frames:
                yield self._in_region(layer, None, frames)
        elif frames:
            at = [*frames.values()]
            yield Source(
                tuple(frames),
                lambda picks, room: cells.open_pages([at[pick] for pick in picks], room.pages(len(picks))),
                lambda: Places(cells.region, *cells.offsets_of(frames.values()), cells.piece_tokens),
            )
        while wave is not None:
            yield self._of_wave(wave)
            wave = next(waves, None)

    def gather(self, layer: int, into: States) -> None:
        """Keys [B, heads, Lk, key_dim] and values of all columns from the first on, to ``into``, which is contiguous.

        What stands at columns that are not stored is some number."""
        straight = self._pass.straight
        for target in into:
            if straight is None or not self._pass.slots:
                target.zero_()
                continue
            for row, (pad, first, length) in enumerate(straight):
                if pad or length <= first:
                    target[row, :, : target.shape[2] - max(length - first, 0)].zero_()
        for source in self.sources(layer):
            states = source.whole or self._dense(source)
            at = source.at if source.whole else [*range(len(source.pages))]
            blocks = blocks_of(self._pass, source.pages)
            if blocks is None:
                copy_scattered(self._pass, source.pages, at, states, into)
                continue
            for block in blocks:
                if source.whole:
                    block = replace(block, picks=[at[pick] for pick in block.picks])
                block.copy(states, into)

    def groups(self, layer: int, room: Room, most: int) -> Iterator[Group]:
        """All pages by who reads them, at most ``most`` pages at a time, in ``room`` or where they are unpacked to: a
        step on may overwrite the last group."""
        if not self._index_of:
            self._learn()
        for source in self.sources(layer):
            alone: dict[int, list[int]] = {}
            together: dict[tuple[int, ...], list[int]] = {}
            for pick, page in enumerate(source.pages):
                rows = self._rows_of.get(page, ())
                if len(rows) == 1:
                    alone.setdefault(rows[0], []).append(pick)
                elif rows:
                    together.setdefault(rows, []).append(pick)
            for rows, picks in together.items():
                for start in range(0, len(picks), most):
                    yield self._group(source, rows, [picks[start : start + most]], room)
            while alone:
                rows = tuple(alone)[:most]
                count = min(*(len(alone[row]) for row in rows), max(most // len(rows), 1))
                yield self._group(source, rows, [alone[row][:count] for row in rows], room)
                alone = {row: left for row, picks in alone.items() if (left := picks[count if row in rows else 0 :])}

    def _group(self, source: Source, rows: tuple[int, ...], picks: Sequence[Sequence[int]], room: Room) -> Group:
        states = source.take([pick for each in picks for pick in each], room)
        keys, values = (  # views, as pages follow each other without a gap
            part.view(len(picks), -1, *part.shape[1:]).permute(0, 3, 1, 2, 4).flatten(2, 3) for part in states
        )
        indices = tuple(tuple(self._index_of[source.pages[pick]] for pick in each) for each in picks)
        return Group(rows, indices, keys, values, source.packed)

    def _learn(self) -> None:
        names = self._pass.closed + self._pass.unclosed
        rows_of: dict[int, list[int]] = {}
        for r, slots in enumerate(self._pass.slots):
            for index, slot in enumerate(slots, self._pass.first_index[r]):
                self._index_of[names[slot]] = index
                rows_of.setdefault(names[slot], []).append(r)
        self._rows_of = {page: tuple(rows) for page, rows in rows_of.items()}

    def _dense(self, source: Source) -> States:
        cells = self._cells
        keys, values = source.take(range(len(source.pages)), Room(cells.shape, cells.dtype, cells.device))
        if not source.packed:
            return keys, values
        unrotate = cells.form.unrotate_output
        return unrotate(keys), unrotate(values)

    def _in_region(self, layer: int, wave: Wave | None, frames: dict[int, tuple[int, ...]]) -> Source:
        """Plain pages in HBM, closed or open: one frame each, read where they are."""
        cells = self._cells
        at = [frame for (frame,) in frames.values()]
        pages = tuple(frames)
        if wave is not None:
            known = self._known.get(layer)
            if known is None or known[0] is not wave:
                known = self._known[layer] = (wave, [offset // cells.frame_nbytes for offset in wave.offsets])
            pages, at = wave.pages + pages, known[1] + at

        def places() -> Places:
            return Places(cells.region, *cells.offsets_of((frame,) for frame in at), cells.piece_tokens)

        return _raw(pages, (cells.keys, cells.values), at, places, packed=False)

    def _of_wave(self, wave: Wave) -> Source:
        cells, plain = self._cells, self._kind.plan.kind.plain
        buffer = cast(Tensor, wave.buffer)

        def places() -> Places:
            keys = [(offset,) for offset in wave.offsets]
            values = [(offset + cells.value_offset,) for offset in wave.offsets] if cells.raw_dtype else keys
            return Places(buffer, keys, values, cells.shape.page_tokens)

        if cells.raw_dtype:
            at = [offset // FRAME_ALIGN for offset in wave.offsets]
            return _raw(wave.pages, cells.raw_pages(buffer), at, places, packed=not plain)

        def unpack(picks: Sequence[int], room: Room) -> States:
            return cells.unpack(buffer, [wave.offsets[pick] for pick in picks], room.dtype)

        return Source(wave.pages, unpack, places, packed=True)


def _raw(
    pages: tuple[int, ...], whole: States, at: Sequence[int], places: Callable[[], Places], *, packed: bool
) -> Source:
    def copy(picks: Sequence[int], room: Room) -> States:
        numbers, into = [at[pick] for pick in picks], room.pages(len(picks))
        return take(whole[0], numbers, into[0]), take(whole[1], numbers, into[1])

    return Source(pages, copy, places, packed, whole, at)
