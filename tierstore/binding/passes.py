"""Notices where a pass over the whole model ends."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

from torch import nn

from tierstore.binding.forwards import unwatch, watch


class Passes:
    """Calls ``end(whole)`` when the outermost forward of ``root`` is over, with False when an exception left it."""

    def __init__(self, root: nn.Module, end: Callable[[bool], None]) -> None:
        self._root = root
        self._end = end
        self._depth = 0
        self._lock = RLock()
        watch(root, self, outermost=True)

    def close(self) -> None:
        """Stop watching. Idempotent."""
        unwatch(self._root, self)

    def enter(self) -> None:
        with self._lock:
            self._depth += 1

    def leave(self, whole: bool) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._end(whole)
