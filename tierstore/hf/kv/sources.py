"""The pages of a layer as they can be read: where they lie in HBM, then what comes as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from tierstore.contracts import Fence
from tierstore.hf.kv.kinds import KvKind
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

    ``packed`` pages come as their format keeps them. With ``whole``, page i is entry ``at[i]`` of these views. What is
    at ``places`` are tokens of ``dtype``, or None where it is codes. ``readers`` are those of a wave.
    """

    pages: tuple[int, ...]
    take: Callable[[Sequence[int], Room], States]
    places: Callable[[], Places]
    dtype: torch.dtype | None
    packed: bool = False
    whole: States | None = None
    at: Sequence[int] = ()
    readers: list[Fence] | None = None


class Sources:
    """Reads pages of one kind. What is ``known`` of a layer's pages in HBM is kept for the next read."""

    def __init__(self, kind: KvKind, known: Known) -> None:
        self._kind, self._known, self._cells = kind, known, kind.cells

    def of(self, layer: int, closed: Sequence[int], unclosed: Sequence[int]) -> Iterator[Source]:
        """The pages ``closed`` and ``unclosed`` of a layer, each in one source. Some layers may have closed pages that
        others have not: they may be among either. A step on says that compute on the last source was issued."""
        pager, cells = self._kind.pager, self._cells
        closed, still = tuple(closed), [page for page in unclosed if pager.is_open(layer, page)]
        if len(still) < len(unclosed):
            closed += tuple(page for page in unclosed if page not in still)
        waves = pager.waves(layer, closed) if closed else iter(())
        frames = {page: pager.frames(layer, page) for page in still}
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
                cells.dtype,
            )
        while wave is not None:
            yield self._of_wave(wave)
            wave = next(waves, None)

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

        return _raw(pages, (cells.keys, cells.values), at, places, cells.dtype, packed=False)

    def _of_wave(self, wave: Wave) -> Source:
        cells, plain = self._cells, self._kind.plan.kind.plain
        buffer = cast(Tensor, wave.buffer)

        def places() -> Places:
            keys, behind = [(offset,) for offset in wave.offsets], cells.value_offset
            values = [(offset + behind,) for offset in wave.offsets] if cells.raw_dtype else keys
            return Places(buffer, keys, values, cells.shape.page_tokens)

        if cells.raw_dtype:
            at = [offset // FRAME_ALIGN for offset in wave.offsets]
            made = _raw(wave.pages, cells.raw_pages(buffer), at, places, cells.raw_dtype, packed=not plain)
            return replace(made, readers=wave.readers)

        def unpack(picks: Sequence[int], room: Room) -> States:
            return cells.unpack(buffer, [wave.offsets[pick] for pick in picks], room.dtype)

        return Source(wave.pages, unpack, places, None, packed=True, readers=wave.readers)


def _raw(
    pages: tuple[int, ...],
    whole: States,
    at: Sequence[int],
    places: Callable[[], Places],
    dtype: torch.dtype,
    *,
    packed: bool,
) -> Source:
    def copy(picks: Sequence[int], room: Room) -> States:
        numbers, into = [at[pick] for pick in picks], room.pages(len(picks))
        return take(whole[0], numbers, into[0]), take(whole[1], numbers, into[1])

    return Source(pages, copy, places, dtype, packed, whole, at)
