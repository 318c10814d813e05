"""An arena over one tensor of bytes, whose frees are ordered by fences."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Lock

import torch

from tierstore.arena import Arena
from tierstore.contracts import Fence
from tierstore.errors import SessionClosedError
from tierstore.extents import Extent


class RegionLease:
    """A lease of a ``RegionPool``."""

    __slots__ = ("_buffer", "_ended", "_pool", "_region", "after", "extent")

    def __init__(self, pool: RegionPool, extent: Extent, region: torch.Tensor, after: Sequence[Fence]) -> None:
        self._pool = pool
        self._region = region
        self._buffer: torch.Tensor | None = None
        self._ended = False
        self.extent = extent
        self.after = after

    @property
    def buffer(self) -> torch.Tensor:
        """A view of the pool's region, uint8, shape ``(extent.nbytes,)``."""
        if self._buffer is None:
            self._pool._prepare(self.extent)
            self._buffer = self._region[self.extent.offset : self.extent.end]
        return self._buffer

    def give_back(self, fence: Fence) -> None:
        """End the lease; the memory may be written again once ``fence`` is complete. Once only: ``ValueError``."""
        if self._ended:
            raise ValueError(f"the lease of {self.extent} was given back before: a lease ends once")
        self._ended = True
        self._pool._take_back(self.extent, fence)


class RegionPool:
    """Leases of ``region`` (1-D uint8, aligned to 4096 bytes where leases ask for that much). Thread-safe.

    What is given back may be leased again at once: the next lease of any byte of it carries the
    fence it was given back with, until that fence is complete.
    """

    def __init__(self, region: torch.Tensor, *, name: str) -> None:
        self.capacity = region.numel()
        self.name = name
        self._region: torch.Tensor | None = region
        self._arena = Arena(self.capacity)
        self._lock = Lock()
        self._pending: deque[tuple[Extent, Fence]] = deque()  # in the order given back

    def lease(self, nbytes: int, *, align: int = 64) -> RegionLease | None:
        """A lease of ``nbytes`` at an address aligned to ``align`` (a power of two up to 4096), or None when
        no gap is large enough. Raises ``SessionClosedError`` after ``close``."""
        with self._lock:
            region = self._region
            if region is None:
                raise SessionClosedError(f"{self.name} is closed and leases nothing: open a new session")
            if not 1 <= align <= 4096 or align & (align - 1):
                raise ValueError(f"align must be a power of two up to 4096, got {align}")
            extent = self._arena.alloc(nbytes, align)
            if extent is None:
                return None
            while self._pending and self._pending[0][1].done():
                self._pending.popleft()
            after = [fence for earlier, fence in self._pending if earlier.overlaps(extent) and not fence.done()]
        return RegionLease(self, extent, region, after)

    def close(self) -> None:
        """Release the memory: at once, or with the last lease or view of it that is still held. Idempotent."""
        with self._lock:
            self._region = None
            self._pending.clear()

    def _prepare(self, extent: Extent) -> None:
        """Called before the first byte of a lease of ``extent`` is used."""

    def _take_back(self, extent: Extent, fence: Fence) -> None:
        with self._lock:
            self._arena.free(extent)
            if extent.nbytes and self._region is not None and not fence.done():
                self._pending.append((extent, fence))
