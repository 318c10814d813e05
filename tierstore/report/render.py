"""A report as plain text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tierstore.budget import format_nbytes

if TYPE_CHECKING:
    from tierstore.report.report import Report

_LONGEST_STALLS = 3


def as_text(report: Report) -> str:
    """Tables of tiers and links, the waits of compute, and the notes; no line ends in a newline."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    passes = "1 pass" if report.passes == 1 else f"{report.passes} passes"
    yield f"{report.seconds:.2f} s, {passes}, {report.resident_share:.1%} of the weight bytes resident"
    yield ""
    yield from _table(("tier", "peak"), [(tier, format_nbytes(peak)) for tier, peak in report.peak_bytes.items()])
    yield ""
    if report.links:
        links = [
            (
                name,
                format_nbytes(link.nbytes),
                f"{link.seconds:.2f} s",
                f"{format_nbytes(link.bytes_per_second)}/s",
                f"{link.moves}",
            )
            for name, link in report.links.items()
        ]
        yield from _table(("link", "moved", "busy", "rate", "moves"), links)
    else:
        yield "no bytes moved"
    yield ""
    stalls = sorted(report.stall_seconds.items(), key=lambda stall: -stall[1])
    longest = ", ".join(f"{unit} {seconds:.3f} s" for unit, seconds in stalls[:_LONGEST_STALLS])
    yield f"compute waited {sum(report.stall_seconds.values()):.2f} s" + (f", most for {longest}" if longest else "")
    yield f"misses: {report.misses}"
    if report.kv is not None:
        yield from report.kv.lines()
    if report.waiting is not None:
        yield from report.waiting.lines()
    for note in report.notes:
        yield f"note: {note}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column leans left, the others, all numbers, right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for first, *rest in (head, *rows):
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join(cells)
