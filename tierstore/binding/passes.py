"""Notices where a pass over the whole model begins and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import RLock, get_ident
from types import FrameType
from typing import Any

from torch import nn

from tierstore.binding.turns import Inert


class Passes:
    """Calls ``begin`` when the outermost forward of ``root`` starts and ``end(whole)`` when it is over.

    ``whole`` is False when the pass broke off with an exception. Torch calls no hook when a forward
    is left by a ``KeyboardInterrupt`` or the like; that pass is ended when the next one begins.
    """

    def __init__(self, root: nn.Module, begin: Callable[[], None], end: Callable[[bool], None]) -> None:
        self._begin = begin
        self._end = end
        self._running: list[tuple[int, FrameType]] = []  # thread and calling frame of each forward under way
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
        self._running.clear()

    def enter(self) -> None:
        with self._lock:
            if self._running:
                self._forget_broken()
            self._running.append((get_ident(), sys._getframe(2)))
            if len(self._running) == 1:
                self._begin()

    def leave(self) -> None:
        with self._lock:
            mine = [item for item in self._running if item[0] == get_ident()]
            if mine:
                self._running.remove(mine[-1])
                if not self._running:
                    self._end(sys.exc_info()[0] is None)

    def _forget_broken(self) -> None:
        """Forget forwards that no thread is inside of any more."""
        current = sys._current_frames()
        inside: set[FrameType] = set()
        for thread in {thread for thread, _ in self._running}:
            frame = current.get(thread)
            while frame is not None:
                inside.add(frame)
                frame = frame.f_back
        broken = [item for item in self._running if item[1] not in inside]
        for item in broken:
            self._running.remove(item)
        if broken and not self._running:
            self._end(False)


class _PassHook:
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call()

    def __deepcopy__(self, memo: dict[int, Any]) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, ())
