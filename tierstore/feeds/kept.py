"""A unit that stays in staging memory once it was read, and is uploaded from there."""

from __future__ import annotations

from threading import Lock
from typing import cast

import torch

from tierstore.contracts import Buffer, Fence, Lease, Store
from tierstore.feeds.direct import requests_for
from tierstore.feeds.parts import Part
from tierstore.tensors import Unit
from tierstore.trips import TripLog


class KeptUnit:
    """``part`` of ``unit`` in ``lease``, which stays until the feed closes.

    ``lock`` is held while an upload is issued and its fence added to ``uploads``, so that a write comes wholly before
    or after it. ``queued`` counts the uploads that another thread will issue: nobody may overtake these, for an upload
    may wait for an earlier one.
    """

    def __init__(self, unit: Unit, part: Part, lease: Lease, store: Store) -> None:
        self.part = part
        self.lease = lease
        self.lock = Lock()
        self.queued = 0
        self.uploads: list[Fence] = []  # those that may still read
        self._unit = unit
        self._store = store
        self._read: Fence | None = None
        self._reading = Lock()

    def ready(self) -> bool:
        """Whether the bytes are there."""
        return self._read is not None and self._read.done() and not _failed(self._read)

    def read(self, trips: TripLog) -> Fence:
        """The fence of the one read that is needed; a read that failed is tried again."""
        with self._reading:
            if self._read is None or (self._read.done() and _failed(self._read)):
                fence = self._store.read(requests_for(self._unit, self.part.layout, self.lease))
                self._read = trips.begin(fence, f"{self._store.tier}->ram", self._unit.nbytes)
            return self._read

    def view(self, block: str, trips: TripLog) -> torch.Tensor:
        """The bytes of a block where they are kept: uint8, shape ``(nbytes,)``; read first if need be."""
        self.read(trips).wait()
        start = self.part.layout.offsets[block]
        nbytes = next(b.nbytes for b in self._unit.blocks if b.name == block)
        return cast(torch.Tensor, self.lease.buffer)[start : start + nbytes]

    def write(self, block: str, data: Buffer, trips: TripLog) -> None:
        """Replace the bytes of a block, after every upload has read them."""
        view = self.view(block, trips)
        with self.lock:
            for upload in self.uploads:
                upload.wait()
            view.copy_(cast(torch.Tensor, data))


def _failed(fence: Fence) -> bool:
    try:
        fence.wait()
    except Exception:  # told to whoever waited for the unit
        return True
    return False
