"""Notices where a pass over the whole model begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

from torch import nn

from tierstore.binding.forwards import unwatch, watch


class Passes:
    """Calls ``begin`` before the outermost forward of ``root``, and ``end(whole)`` when it is over, with False
    when an exception left it."""

    def __init__(self, root: nn.Module, begin: Callable[[], None], end: Callable[[bool], None]) -> None:
        self._root = root
        self._begin = begin
        self._end = end
        self._depth = 0
        self._lock = RLock()
        watch(root, self, outermost=True)

    def close(self) -> None:
        """Stop watching. Idempotent."""
        unwatch(self._root, self)

    def next(self) -> None:
        """Let the pass under way be over, as a whole, and another begin, within the forwards that are under way."""
        with self._lock:
            self._end(True)
            self._begin()

    def enter(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._begin()

    def leave(self, whole: bool) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._end(whole)
