"""Memory that is garbage wherever no lease holds it, so that use after the end of a lease shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from tierstore.contracts import Fence
from tierstore.extents import Extent
from tierstore.pools.region import RegionLease, RegionPool

POISON = 0xFF
"""The byte that memory without a user is filled with: NaN in every floating type, -1 in every signed one."""


class Watcher(Protocol):
    """Who knows when the memory of a lease that ended may be poisoned."""

    def released(self, buffer: torch.Tensor, fence: Fence) -> None:
        """The lease of ``buffer`` ends with ``fence``."""
        ...

    def check_written_in_place(self, lease: RegionLease) -> None:
        """Called before ``released``."""
        ...

    def forget(self, region: torch.Tensor) -> None:
        """The memory of ``region`` goes away."""
        ...

    def close(self) -> None:
        """Let everything that is under way happen."""
        ...


def poison(buffer: torch.Tensor) -> None:
    """Fill ``buffer`` with ``POISON``."""
    buffer.fill_(POISON)


class PoisonPool:
    """A ``Pool`` of host memory that ``watcher`` is told about, and that is poison wherever no lease holds it."""

    def __init__(self, nbytes: int, watcher: Watcher) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            spare = torch.full((nbytes + 4096,), POISON, dtype=torch.uint8)
        skip = -spare.data_ptr() % 4096
        self._region = spare[skip : skip + nbytes]
        self._pool = RegionPool(self._region, name="the poison pool")
        self._watcher = watcher
        self._closed = False

    @property
    def capacity(self) -> int:
        """Bytes the pool can lease at most."""
        return self._pool.capacity

    def lease(self, nbytes: int, *, align: int = 64) -> PoisonLease | None:
        """As ``Pool.lease``; the buffer is poison, or will be when its earlier users are through."""
        lease = self._pool.lease(nbytes, align=align)
        return None if lease is None else PoisonLease(lease, self)

    def close(self) -> None:
        """Poison everything, so that what is used after this shows. Idempotent."""
        self._watcher.close()
        self._region.fill_(POISON)
        self._watcher.forget(self._region)
        self._pool.close()
        self._closed = True

    def _ends(self, lease: RegionLease, fence: Fence) -> None:
        if not self._closed:  # afterwards all of it is poison, and nobody's
            self._watcher.check_written_in_place(lease)
            self._watcher.released(lease.buffer, fence)


class PoisonLease:
    """A lease of a ``PoisonPool``."""

    def __init__(self, lease: RegionLease, pool: PoisonPool) -> None:
        self._lease = lease
        self._pool = pool
        self._ended = False

    @property
    def extent(self) -> Extent:
        """Where in the pool."""
        return self._lease.extent

    @property
    def buffer(self) -> torch.Tensor:
        """The bytes, uint8."""
        return self._lease.buffer

    @property
    def after(self) -> Sequence[Fence]:
        """Earlier users of the memory."""
        return self._lease.after

    def give_back(self, fence: Fence) -> None:
        """End the lease and poison the memory. Once only."""
        if not self._ended:
            self._ended = True
            # Before it is given back: afterwards it may be somebody else's.
            self._pool._ends(self._lease, fence)
        self._lease.give_back(fence)
