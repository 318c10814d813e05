"""Reading a layer's pages: whole, in the order of the batch's columns, or a group of pages at a time for its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tierstore.hf.kv.gathering import blocks_of, copy_scattered
from tierstore.hf.kv.moving import offsets_of, sent
from tierstore.hf.kv.passes import KindPass
from tierstore.hf.kv.room import Room, States
from tierstore.hf.kv.sources import Known, Source, Sources


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


class Readers(NamedTuple):
    """The ``rows`` that read a page, which is ``number`` of the pages of each of them."""

    rows: tuple[int, ...]
    number: int


NOBODY = Readers((), 0)


class Reader:
    """Reads the pages of one kind in one pass."""

    def __init__(self, passing: KindPass, known: Known) -> None:
        self._pass = passing
        self._sources = Sources(passing.kind, known)
        self._cells = passing.kind.cells
        self._readers: dict[int, Readers] = {}

    def sources(self, layer: int) -> Iterator[Source]:
        """All pages of the pass, each in one source. A step on says that compute on the last source was issued."""
        return self._sources.of(layer, self._pass.closed, self._pass.unclosed)

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
            if self._cells.movers is not None and source.dtype == into[0].dtype:
                self._move(source, into)
                continue
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

    def _move(self, source: Source, into: States) -> None:
        """All tokens of ``source`` to their columns, in one launch of a kernel."""
        places = source.places()
        starts = dict(zip(source.pages, zip(places.keys, places.values, strict=True), strict=True))
        nowhere = [-1] * len(places.keys[0])
        missing = (nowhere, nowhere)
        pages = [starts.get(page, missing) for page in (*self._pass.closed, *self._pass.unclosed)] + [missing]
        offsets = sent(torch.tensor(offsets_of(*zip(*pages, strict=True)), device="cpu"), places.buffer.device)
        where = self._pass.places(places.piece_tokens)
        self._cells.movers.gather(places.buffer, offsets, *where, *(part.transpose(1, 2) for part in into))

    def groups(self, layer: int, room: Room, most: int) -> Iterator[Group]:
        """All pages by who reads them, at most ``most`` pages at a time, in ``room`` or where they are unpacked to: a
        step on may overwrite the last group."""
        readers = self.readers
        for source in self.sources(layer):
            alone: dict[int, list[int]] = {}
            together: dict[tuple[int, ...], list[int]] = {}
            for pick, page in enumerate(source.pages):
                rows, _ = readers.get(page, NOBODY)
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
        indices = tuple(tuple(self.readers[source.pages[pick]].number for pick in each) for each in picks)
        return Group(rows, indices, keys, values, source.packed)

    @property
    def readers(self) -> Mapping[int, Readers]:
        """Who reads each page of the pass."""
        if not self._readers:
            names = self._pass.closed + self._pass.unclosed
            found: dict[int, tuple[list[int], int]] = {}
            for r, slots in enumerate(self._pass.slots):
                for index, slot in enumerate(slots, self._pass.first_index[r]):
                    found.setdefault(names[slot], ([], index))[0].append(r)
            self._readers = {page: Readers(tuple(rows), index) for page, (rows, index) in found.items()}
        return self._readers

    def _dense(self, source: Source) -> States:
        cells = self._cells
        keys, values = source.take(range(len(source.pages)), Room(cells.shape, cells.dtype, cells.device))
        if not source.packed:
            return keys, values
        unrotate = cells.form.unrotate_output
        return unrotate(keys), unrotate(values)
