"""Fences made of other fences: a promise of work that another thread will start, and the end of work, well or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from threading import Event

from tierstore.contracts import Fence
from tierstore.errors import TierstoreError


class Over:
    """Done when all of some fences are, whether their work succeeded or not: all that reuse of memory needs."""

    __slots__ = ("_fences",)

    def __init__(self, fences: Sequence[Fence]) -> None:
        self._fences = fences

    def done(self) -> bool:
        """Whether all of the work is over."""
        return all(fence.done() for fence in self._fences)

    def wait(self) -> None:
        """Block until it is."""
        for fence in self._fences:
            with suppress(TierstoreError):  # whoever used the bytes was told; here only the end of the work matters
                fence.wait()

    def gate(self) -> None:
        """Make compute issued from now on come after it."""
        for fence in self._fences:
            with suppress(TierstoreError):
                fence.gate()


class Promise:
    """Complete when it was kept and every fence it was kept with is complete."""

    __slots__ = ("_error", "_fences", "_kept")

    def __init__(self) -> None:
        self._kept = Event()
        self._fences: Sequence[Fence] = ()
        self._error: BaseException | None = None

    def keep(self, fences: Sequence[Fence], error: BaseException | None = None) -> None:
        """The work is under way and ends with ``fences``; ``error`` says why some of it could not be started."""
        self._fences = fences
        self._error = error
        self._kept.set()

    def done(self) -> bool:
        """Whether all of the work is over."""
        return self._kept.is_set() and all(fence.done() for fence in self._fences)

    def wait(self) -> None:
        """Block until it is; raise what it raised."""
        self._kept.wait()
        error = self._error
        for fence in self._fences:
            try:
                fence.wait()
            except Exception as problem:  # the others still write: they must end before this does
                error = error or problem
        if error is not None:
            raise error.with_traceback(None)

    def gate(self) -> None:
        """Make compute issued from now on wait for the work, once it is under way."""
        self._kept.wait()
        if self._error is not None:
            self.wait()
        for fence in self._fences:
            fence.gate()


def nothing() -> Promise:
    """The fence of no work: complete."""
    promise = Promise()
    promise.keep(())
    return promise


def wait_for_end(fences: Iterable[Fence]) -> None:
    """Block until the work of ``fences`` is over, well or not: all that the next user of the memory needs."""
    for fence in fences:
        with suppress(Exception):  # told to whoever waits for that work
            fence.wait()
