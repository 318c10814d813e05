"""Which cells are fetched together, and where in a slot they stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tierstore.page_plan import SECTOR, KindPlan
from tierstore.paging.places import NOWHERE, Cell

FETCH_NBYTES = 4 << 20
"""Bytes of one fetch, where slots are that many: the work around it is little then."""


def runs_a_fetch(plan: KindPlan, *, staged: bool) -> int:
    """How many runs one fetch brings at most, so that 5 fetches, and 4 in staging memory, are under way together."""
    slots = min(plan.ring_slots // 5, plan.staging_slots // 4) if staged else plan.ring_slots // 5
    return max(1, min(-(-FETCH_NBYTES // plan.slot_nbytes), slots))


def places_in_slot(cells: Sequence[Cell], frame_nbytes: int, slot_nbytes: int) -> list[int]:
    """The byte at which each cell stands in a slot: so that a disk can write there directly, if the slot has room."""
    offsets: list[int] = []
    end, last = 0, None
    for cell in cells:
        if cell.run is not None and not (last is not None and last.run is cell.run and last.at + 1 == cell.at):
            end += (cell.at * frame_nbytes - end) % SECTOR
        offsets.append(end)
        end, last = end + frame_nbytes, cell
    return offsets if end <= slot_nbytes else [index * frame_nbytes for index in range(len(cells))]


def groups(cells: Iterable[Cell], most: int) -> Iterator[tuple[Cell, ...]]:
    """Cells that are fetched together, at most ``most``: those in RAM by themselves, runs of the store whole where
    they fit."""
    in_ram: list[Cell] = []
    runs: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.ram != NOWHERE:
            in_ram.append(cell)
        else:
            runs.setdefault(id(cell.run), []).append(cell)
    for begin in range(0, len(in_ram), most):
        yield tuple(in_ram[begin : begin + most])
    group: list[Cell] = []
    for run in runs.values():
        run.sort(key=lambda cell: cell.at)
        if group and len(group) + len(run) > most:
            yield tuple(group)
            group = []
        group += run
    if group:
        yield tuple(group)
