"""Half-open ranges of bytes within one region (a file, a pool, a slot)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """The bytes ``[offset, offset + nbytes)`` of a region."""

    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.nbytes < 0:
            raise ValueError(f"an extent needs offset >= 0 and nbytes >= 0, got {self}")

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.nbytes

    def overlaps(self, other: Extent) -> bool:
        """Whether the two share at least one byte."""
        return self.offset < other.end and other.offset < self.end


def align_up(value: int, block: int) -> int:
    """The smallest multiple of ``block`` that is at least ``value``."""
    return -(-value // block) * block
