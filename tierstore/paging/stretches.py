"""Neighbouring cells move as one: the fewest reads and copies for some cells."""

from __future__ import annotations

from collections.abc import Sequence

from tierstore.contracts import PageRun
from tierstore.paging.places import Cell

Stretch = tuple[PageRun, int, int, int]
"""``(run, first, count, offset)``: cells ``[first, first + count)`` of a run go to bytes from ``offset`` on."""


def stretches(cells: Sequence[Cell], offsets: Sequence[int], frame_nbytes: int) -> list[Stretch]:
    """Reads that bring cells of the store to ``offsets``."""
    found: list[Stretch] = []
    for cell, offset in zip(cells, offsets, strict=True):
        if cell.run is None:
            raise AssertionError("a cell that is neither in HBM nor in RAM is in the store")
        if found:
            run, first, count, at = found[-1]
            if run is cell.run and first + count == cell.at and at + count * frame_nbytes == offset:
                found[-1] = run, first, count + 1, at
                continue
        found.append((cell.run, cell.at, 1, offset))
    return found


def joined(sources: Sequence[int], targets: Sequence[int], frame_nbytes: int) -> list[tuple[int, int, int]]:
    """``(source, target, nbytes)`` of copies that bring a frame at each of ``sources`` to its place in ``targets``."""
    found: list[tuple[int, int, int]] = []
    for source, target in zip(sources, targets, strict=True):
        if found:
            start, at, nbytes = found[-1]
            if start + nbytes == source and at + nbytes == target:
                found[-1] = start, at, nbytes + frame_nbytes
                continue
        found.append((source, target, frame_nbytes))
    return found
