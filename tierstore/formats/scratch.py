"""Memory for what lives no longer than one call, kept for the next one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod
from weakref import WeakSet

import torch
from torch import Tensor


class _Buffers:
    """Those of one thread, by what for and where."""

    __slots__ = ("__weakref__", "held")

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.device], Tensor] = {}


class Scratch:
    """Buffers by purpose, one each for every thread and device, that grow to the most that was ever asked of them.

    What was taken is valid until the same thread takes for the same purpose again; other purposes never share bytes
    with it. A thread's buffers go with the thread, and all of them with this object.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._everyones: WeakSet[_Buffers] = WeakSet()

    def take(self, purpose: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor, aligned as torch aligns its own."""
        nbytes = prod(shape) * dtype.itemsize
        held = self._mine().held
        buffer = held.get((purpose, device))
        if buffer is None or buffer.numel() < nbytes:
            held.pop((purpose, device), None)
            del buffer  # before there are two
            with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
                buffer = held[purpose, device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return buffer[:nbytes].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held now, by all threads."""
        with self._lock:
            everyones = list(self._everyones)
        return sum(buffer.numel() for buffers in everyones for buffer in tuple(buffers.held.values()))

    def _mine(self) -> _Buffers:
        mine: _Buffers | None = getattr(self._local, "buffers", None)
        if mine is None:
            mine = self._local.buffers = _Buffers()
            with self._lock:
                self._everyones.add(mine)
        return mine
