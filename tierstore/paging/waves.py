"""Waves, groups of closed cells that compute can read now; and which cells of a page list are not among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierstore.contracts import Buffer, Fence
from tierstore.paging.places import NOWHERE, Cell, Places

_KEPT = 4  # splits of a layer: as many groups of rows ask for other pages in turn


@dataclass(frozen=True, slots=True)
class Wave:
    """The closed cell of each of ``pages`` begins at byte ``offsets[i]`` of ``buffer``.

    Where other cells will come to its bytes it has ``readers``: to be told, before the next wave is asked for, of what
    reads it beside the compute of the thread that asks."""

    pages: tuple[int, ...]
    buffer: Buffer
    offsets: tuple[int, ...]
    readers: list[Fence] | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """The cells of ``pages`` in a layer: ``here``, ``streamed``, lost ones, and pages with no closed cell there."""

    pages: tuple[int, ...]
    epoch: int
    here: tuple[Wave, ...]
    streamed: tuple[Cell, ...]
    lost: tuple[int, ...]
    missing: tuple[int, ...]


class Splitter:
    """Splits page lists; asked again, it answers from memory as long as no cell of the layer moved.

    Frames of ``region``, and where compute reads host memory those of ``ram``, are read in place.
    """

    def __init__(self, places: Places, frame_nbytes: int, region: Buffer, ram: Buffer | None) -> None:
        self._places = places
        self._frame_nbytes = frame_nbytes
        self._region = region
        self._ram = ram
        self._known: list[list[Split]] = [[] for _ in places.cells]

    def split(self, layer: int, pages: Sequence[int]) -> Split:
        """Where the cells of ``pages`` are; a page named twice counts once."""
        pages, known, epoch = tuple(pages), self._known[layer], self._places.epochs[layer]
        for split in known:
            if split.epoch == epoch and split.pages == pages:
                return split
        known[:] = [split for split in known if split.epoch == epoch][: _KEPT - 1]
        known.insert(0, split := self._split(layer, pages, epoch))
        return split

    def _split(self, layer: int, pages: tuple[int, ...], epoch: int) -> Split:
        in_hbm: dict[int, int] = {}
        in_ram: dict[int, int] = {}
        streamed: list[Cell] = []
        lost: list[int] = []
        missing: list[int] = []
        cells = self._places.cells[layer]
        for page in dict.fromkeys(pages):
            cell = cells.get(page)
            if cell is not None and not cell.closed:
                cell = cell.before
            if cell is None:
                missing.append(page)
            elif cell.lost:
                lost.append(page)
            elif cell.frame != NOWHERE:
                in_hbm[page] = cell.frame
            elif cell.ram != NOWHERE and self._ram is not None:
                in_ram[page] = cell.ram
            else:
                streamed.append(cell)
        here = [self._wave(in_hbm, self._region)] if in_hbm else []
        if in_ram and self._ram is not None:
            here.append(self._wave(in_ram, self._ram))
        return Split(pages, epoch, tuple(here), tuple(streamed), tuple(lost), tuple(missing))

    def _wave(self, frames: dict[int, int], buffer: Buffer) -> Wave:
        return Wave(tuple(frames), buffer, tuple(frame * self._frame_nbytes for frame in frames.values()))
