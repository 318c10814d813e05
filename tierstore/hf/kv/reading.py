"""Reading a layer's pages: whole, in the order of the batch's columns, or a group of pages at a time for its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from tierstore.hf.kv.gathering import States, blocks_of, copy_scattered
from tierstore.hf.kv.passes import KindPass
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
    """Pages that can be read now: ``take`` gives keys [n, page_tokens, heads, key_dim] and values of those named.

    ``packed`` pages come as their format keeps them. With ``whole``, page i is entry ``at[i]`` of these views.
    """

    pages: tuple[int, ...]
    take: Callable[[Sequence[int]], States]
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
    """Reads the pages of one kind in one pass. ``scratch`` are bytes on the device that attention works on."""

    def __init__(self, passing: KindPass, known: Known) -> None:
        self._pass = passing
        self._kind = passing.kind
        self._known = known
        self._cells = passing.kind.cells
        self._index_of: dict[int, int] = {}
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
            yield Source(
                tuple(frames),
                lambda pages: cells.open_pages([frames[page] for page in pages]),
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

    def groups(self, layer: int, most: int) -> Iterator[Group]:
        """All pages by who reads them, at most ``most`` pages at a time."""
        if not self._index_of:
            self._learn()
        names = self._pass.closed + self._pass.unclosed
        slot_of = {page: slot for slot, page in enumerate(names)}
        for source in self.sources(layer):
            alone: dict[int, list[int]] = {}
            together: dict[tuple[int, ...], list[int]] = {}
            for page in source.pages:
                rows = self._rows_of[slot_of[page]]
                if len(rows) == 1:
                    alone.setdefault(rows[0], []).append(page)
                elif rows:
                    together.setdefault(rows, []).append(page)
            for rows, pages in together.items():
                for start in range(0, len(pages), most):
                    yield self._group(source, rows, [pages[start : start + most]], slot_of)
            while alone:
                rows = tuple(alone)[:most]
                count = min(*(len(alone[row]) for row in rows), max(most // len(rows), 1))
                yield self._group(source, rows, [alone[row][:count] for row in rows], slot_of)
                alone = {row: left for row, pages in alone.items() if (left := pages[count if row in rows else 0 :])}

    def _group(
        self, source: Source, rows: tuple[int, ...], pages: Sequence[Sequence[int]], slot_of: dict[int, int]
    ) -> Group:
        states = source.take([page for each in pages for page in each])
        keys, values = (
            part.view(len(pages), -1, *part.shape[1:]).permute(0, 3, 1, 2, 4).flatten(2, 3) for part in states
        )
        indices = tuple(tuple(self._index_of[slot_of[page]] for page in each) for each in pages)
        return Group(rows, indices, keys, values, source.packed)

    def _learn(self) -> None:
        rows_of: dict[int, list[int]] = {}
        for r, slots in enumerate(self._pass.slots):
            for index, slot in enumerate(slots, self._pass.first_index[r]):
                self._index_of[slot] = index
                rows_of.setdefault(slot, []).append(r)
        self._rows_of = {slot: tuple(rows) for slot, rows in rows_of.items()}

    def _dense(self, source: Source) -> States:
        keys, values = source.take(source.pages)
        if not source.packed:
            return keys, values
        unrotate = self._cells.form.unrotate_output
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
        number = dict(zip(pages, at, strict=True)).__getitem__

        def take(wanted: Sequence[int]) -> States:
            which = torch.tensor(at if tuple(wanted) == pages else [*map(number, wanted)], device=cells.device)
            return cells.keys[which], cells.values[which]

        def places() -> Places:
            return Places(cells.region, *cells.offsets_of((frame,) for frame in at), cells.piece_tokens)

        return Source(pages, take, places, whole=(cells.keys, cells.values), at=at)

    def _of_wave(self, wave: Wave) -> Source:
        offset_of = dict(zip(wave.pages, wave.offsets, strict=True))
        cells, plain = self._cells, self._kind.plan.kind.plain

        def places() -> Places:
            keys = [(offset,) for offset in wave.offsets]
            values = [(offset + cells.value_offset,) for offset in wave.offsets] if cells.raw_dtype else keys
            return Places(cast(Tensor, wave.buffer), keys, values, cells.shape.page_tokens)

        return Source(
            wave.pages,
            lambda pages: cells.closed_pages(wave.buffer, [offset_of[page] for page in pages]),
            places,
            packed=not plain,
        )
