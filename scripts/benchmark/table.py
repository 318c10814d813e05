"""Rows of what was measured beside what was to be reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """``met`` is None for a figure that has no goal."""

    what: str
    measured: str
    goal: str = ""
    met: bool | None = None


def at_most(what: str, value: float, goal: float) -> Row:
    """A figure that is to be no more than ``goal``."""
    return Row(what, f"{value:.3f}", f"<= {goal:.2f}", value <= goal)


def goals_of(rows: Iterable[Row]) -> dict[str, bool]:
    """Which goals were met, by what was measured."""
    return {row.what: row.met for row in rows if row.met is not None}


def as_text(rows: Sequence[Row]) -> str:
    """A table; the last column says "met" or "MISSED"."""
    return "\n".join(line.rstrip() for line in _lines(rows))


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    verdicts = {None: "", True: "met", False: "MISSED"}
    cells = [("measure", "value", "goal", "")]
    cells += [(row.what, row.measured, row.goal, verdicts[row.met]) for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)]
    for what, measured, goal, verdict in cells:
        yield f"{what:<{widths[0]}}  {measured:>{widths[1]}}  {goal:<{widths[2]}}  {verdict}"
