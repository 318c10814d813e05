"""Memory for what lives no longer than one call, kept for the next one."""

from __future__ import annotations

import threading
from math import prod
from weakref import WeakSet

import torch
from torch import Tensor

MOST_VIEWS = 1024
"""Shapes of buffers that a thread remembers before it forgets them all: a model has tens."""

Place = tuple[torch.device, int]
"""A device and, of a GPU, the stream: what another stream still reads is not written to."""


class Scratch:
    """Buffers by purpose, one each for every thread and device, that grow to the most that was ever asked of them.

    What was taken is valid until the same thread takes for the same purpose again; other purposes never share bytes
    with it. A thread's buffers go with the thread, and all of them with this object.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._everyones: WeakSet[_Buffers] = WeakSet()

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with anything in it. The same object when all is as it was the last time."""
        try:
            mine: _Buffers = self._local.buffers
        except AttributeError:
            mine = self._local.buffers = _Buffers()
            with self._lock:
                self._everyones.add(mine)
        place = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        view = mine.views.get((purpose, place, shape, dtype))
        return mine.view(purpose, place, shape, dtype) if view is None else view

    @property
    def nbytes(self) -> int:
        """Bytes held now, by all threads."""
        with self._lock:
            everyones = list(self._everyones)
        return sum(buffer.numel() for mine in everyones for buffer in list(mine.memory.values()))


class _Buffers:
    """Those of one thread, as bytes and as they were asked for."""

    __slots__ = ("__weakref__", "memory", "views")

    def __init__(self) -> None:
        self.memory: dict[tuple[str, Place], Tensor] = {}
        self.views: dict[tuple[str, Place, tuple[int, ...], torch.dtype], Tensor] = {}

    def view(self, purpose: str, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One that is not among ``views`` yet."""
        nbytes = prod(shape) * dtype.itemsize
        if len(self.views) >= MOST_VIEWS:
            self.views.clear()
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            buffer = self.memory.pop((purpose, place), None)
            if buffer is None or buffer.numel() < nbytes:
                del buffer  # and all views of it, so that it is free before there is more
                self.views = {key: view for key, view in self.views.items() if key[:2] != (purpose, place)}
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=place[0])
            self.memory[purpose, place] = buffer
            view = self.views[purpose, place, shape, dtype] = buffer[:nbytes].view(dtype).view(shape)
        return view
