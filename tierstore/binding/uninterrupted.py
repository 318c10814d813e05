"""Keeps signal handlers, such as the one of Ctrl-C, out of steps that must be whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class Uninterrupted:
    """Inside the ``with``, handlers in Python wait; they run at its end, in the order in which signals came.

    An exception that such a handler raises then comes out of the ``with``, whose work is done. Python runs
    handlers in the main thread only, so elsewhere this does nothing.
    """

    __slots__ = ("_came", "_handlers")

    def __enter__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[int] = []
        if threading.get_ident() != threading.main_thread().ident:
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for number in self._came:
            self._handlers[number](number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
