"""Which frames of a region are free, as numbers."""

from __future__ import annotations

from collections.abc import Iterable


class FrameList:
    """Frames ``0 .. count - 1``; all are free at first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many frames can be taken."""
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """``count`` frames, neighbours where that is easy. Raises ``ValueError`` when fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} frames were asked for, {len(self._free)} of {self.count} are free: make room")
        taken = tuple(self._free[: -count - 1 : -1])
        del self._free[len(self._free) - count :]
        return taken

    def give_back(self, frames: Iterable[int]) -> None:
        """Frames that were taken and are free again."""
        self._free.extend(reversed(tuple(frames)))
