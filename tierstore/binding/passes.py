"""Notices where a pass over the whole model begins and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import RLock
from typing import Any

from torch import nn

from tierstore.binding.turns import Inert


class Passes:
    """Calls ``begin`` when the outermost forward of ``root`` starts and ``end(whole)`` when it is over.

    ``whole`` is False when the pass broke off with an exception.
    """

    def __init__(self, root: nn.Module, begin: Callable[[], None], end: Callable[[bool], None]) -> None:
        self._begin = begin
        self._end = end
        self._depth = 0
        self._lock = RLock()
        self._handles = [
            root.register_forward_pre_hook(_PassHook(self.enter), prepend=True),
            root.register_forward_hook(_PassHook(self.leave), always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def enter(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._begin()

    def leave(self) -> None:
        with self._lock:
            if self._depth:
                self._depth -= 1
                if not self._depth:
                    self._end(sys.exc_info()[0] is None)


class _PassHook:
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call()

    def __deepcopy__(self, memo: dict[int, Any]) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, ())
