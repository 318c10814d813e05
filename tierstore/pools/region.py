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
    """A lease of a ``RegionPool``: ``buffer`` is a view of its region, uint8, shape ``(extent.nbytes,)``."""

    __slots__ = ("_pool", "after", "buffer", "extent")

    def __init__(self, pool: RegionPool, extent: Extent, buffer: torch.Tensor, after: Sequence[Fence]) -> None:
        self._pool: RegionPool | None = pool
        self.extent = extent
        self.buffer = buffer
        self.after = after

    def give_back(self, fence: Fence) -> None:
        """End the lease; the memory may be written again once ``fence`` is complete. Once only: ``ValueError``."""
        pool, self._pool = self._pool, None
        if pool is None:
            raise ValueError(f"the lease of {self.extent} was given back before: a lease ends once")
        pool._take_back(self.extent, fence)


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
        self._ready(extent)
        return RegionLease(self, extent, region[extent.offset : extent.end], after)

    def close(self) -> None:
        """Release the memory: at once, or with the last view of it that is still held. Idempotent."""
        with self._lock:
            self._region = None
            self._pending.clear()

    def _ready(self, extent: Extent) -> None:
        """Called before ``extent`` is handed out."""

    def _take_back(self, extent: Extent, fence: Fence) -> None:
        with self._lock:
            self._arena.free(extent)
            if extent.nbytes and self._region is not None and not fence.done():
                self._pending.append((extent, fence))
