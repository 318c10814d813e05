"""What micro-batches hold while they wait in host memory, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tierstore.budget import format_nbytes


@dataclass(frozen=True, slots=True)
class WaitingReport:
    """``host_nbytes`` of ram are for it, taken once; of these ``peak_nbytes`` were used at most. ``moved_nbytes``
    crossed the link so far, there and back."""

    host_nbytes: int
    peak_nbytes: int
    moved_nbytes: int

    def lines(self) -> Iterator[str]:
        """For people."""
        yield (
            f"hidden states: up to {format_nbytes(self.peak_nbytes)} waited in {format_nbytes(self.host_nbytes)} of "
            f"ram, {format_nbytes(self.moved_nbytes)} moved"
        )
