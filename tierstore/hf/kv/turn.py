"""Whose turn it is to use the memory of a KV cache: one thread's at a time, and streams compute in that order."""

from __future__ import annotations

from threading import RLock
from types import TracebackType

from tierstore.contracts import CopyEngine, Fence
from tierstore.errors import DeviceError
from tierstore.fences import Over, nothing


class Turn:
    """A lock that a thread may take again while it has it.

    Threads may compute on streams of their own: what one issues in its turn comes after what others issued in theirs,
    since pages that one gave back are written to by the next."""

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self._lock = RLock()
        self._depth = 0
        self._before: Fence = nothing()

    def acquire(self, *, blocking: bool = True) -> bool:
        """Whether it is this thread's turn; waits for it if ``blocking``. To be given back by ``release``."""
        if not self._lock.acquire(blocking=blocking):
            return False
        self._depth += 1
        if self._depth == 1:
            Over((self._before,)).gate()
        return True

    def release(self) -> None:
        """Give one ``acquire`` back; the last one lets others have their turn."""
        try:
            if self._depth == 1:
                self._before = self._engine.mark()
        except DeviceError:  # nothing is computed any more: who waits for it is told
            self._before = nothing()
        finally:
            self._depth -= 1
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.release()
