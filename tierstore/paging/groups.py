"""Which cells are fetched together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tierstore.paging.places import NOWHERE, Cell


def groups(cells: Iterable[Cell], most: int) -> Iterator[tuple[Cell, ...]]:
    """Cells that are fetched together, ``most`` at a time: those in RAM by themselves, runs of the store whole where
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
