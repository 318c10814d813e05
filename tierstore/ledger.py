"""Counts the weight bytes that live in one tier, against its hard bound."""

from __future__ import annotations

from threading import Lock


class Ledger:
    """Live payload bytes of the tier ``name``, never more than ``limit``. Thread-safe."""

    def __init__(self, limit: int, name: str) -> None:
        if limit < 0:
            raise ValueError(f"the ledger of {name} needs a limit >= 0, got {limit}")
        self.limit = limit
        self.name = name
        self._live = 0
        self._peak = 0
        self._lock = Lock()

    @property
    def live(self) -> int:
        """Bytes taken and not given back."""
        return self._live

    @property
    def peak(self) -> int:
        """The most bytes that were ever live at once."""
        return self._peak

    def take(self, nbytes: int) -> bool:
        """Count ``nbytes`` more as live; False, with nothing counted, when that would pass the limit."""
        if nbytes < 0:
            raise ValueError(f"cannot take {nbytes} bytes of {self.name}: a size is never negative")
        with self._lock:
            live = self._live + nbytes
            if live > self.limit:
                return False
            self._live = live
            self._peak = max(self._peak, live)
            return True

    def give(self, nbytes: int) -> None:
        """Count ``nbytes`` as gone. Raises ``ValueError``, with nothing changed, when fewer are live."""
        with self._lock:
            if not 0 <= nbytes <= self._live:
                raise ValueError(f"cannot give back {nbytes} bytes of {self.name}: {self._live} are live")
            self._live -= nbytes
