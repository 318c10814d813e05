"""Hidden states of chunks of one input that wait for their turn in the next layer: on the device, or on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self, cast

import torch
from torch import Tensor

from tierstore.contracts import Fence
from tierstore.hf.kv.lazy import LazyTensor

if TYPE_CHECKING:
    from tierstore.backends import Backend

_LEAVING = 2
"""So many chunks may be on their way at once that nobody waits for; their memory is theirs until they are there."""
_ALIGN = 4096


class Waiting(Protocol):
    """The chunks, by number: [B, tokens, H] each."""

    def put(self, number: int, chunk: Tensor) -> None:
        """Leave a chunk here, in place of what it was made of."""
        ...

    def take(self, number: int) -> Tensor:
        """A chunk, on the device. What comes next is that of the next number."""
        ...

    def close(self) -> None:
        """Drop all of them. Idempotent."""
        ...


class Here:
    """Chunks stay where they are made."""

    def __init__(self, count: int) -> None:
        self._chunks: list[Tensor | None] = [None] * count

    def put(self, number: int, chunk: Tensor) -> None:
        self._chunks[number] = chunk

    def take(self, number: int) -> Tensor:
        return cast(Tensor, self._chunks[number])

    def close(self) -> None:
        self._chunks.clear()


class OnHost:
    """Chunks wait in (pinned) host memory of ``backend``, taken when the first one comes and given back by ``close``.

    They go there, and come back, while others are computed with; ``nbytes`` is that of all of them.
    """

    def __init__(self, backend: Backend, count: int, nbytes: int) -> None:
        self._engine = backend.engine
        self._pool = backend.host_pool(nbytes + count * _ALIGN)
        self._count = count
        self._places: dict[int, Tensor] = {}
        self._shapes: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = {}
        self._there: dict[int, Fence] = {}
        self._read: dict[int, Fence] = {}
        self._coming: dict[int, tuple[Tensor, Fence]] = {}
        self._leaving: list[tuple[Tensor, Fence]] = []

    def put(self, number: int, chunk: Tensor) -> None:
        chunk = chunk.contiguous()
        raw = _bytes(chunk)
        if number not in self._places:
            lease = self._pool.lease(raw.numel(), align=_ALIGN)
            assert lease is not None, "the pool has room for all chunks"
            self._places[number] = cast(Tensor, lease.buffer)
        self._shapes[number] = (chunk.shape, chunk.dtype, chunk.device)
        before = [known[number] for known in (self._there, self._read) if number in known]
        if number in self._coming:  # what it is put in place of was not asked for
            self._leaving.append(self._coming.pop(number))
            before.append(self._leaving[-1][1])
        fence = self._engine.copy([(raw, self._places[number])], after=[self._engine.mark(), *before])
        self._there[number] = fence
        self._leaving.append((chunk, fence))
        while len(self._leaving) > _LEAVING:
            self._leaving.pop(0)[1].wait()

    def take(self, number: int) -> Tensor:
        chunk, fence = self._begin(number)
        del self._coming[number]
        following = (number + 1) % self._count
        if following in self._there:
            self._begin(following)
        fence.gate()
        self._read[number] = fence
        return chunk

    def close(self) -> None:
        fences = [fence for _, fence in (*self._leaving, *self._coming.values())]
        self._leaving, self._coming = [], {}
        try:
            for fence in fences:
                fence.wait()
            self._engine.mark().wait()
        finally:
            self._places.clear()
            self._pool.close()

    def _begin(self, number: int) -> tuple[Tensor, Fence]:
        """Let a chunk come, if it does not yet."""
        if number not in self._coming:
            shape, dtype, device = self._shapes[number]
            place, there = self._places[number], self._there[number]
            chunk = torch.empty(shape, dtype=dtype, device=device)
            # the memory of the chunk may have had another use, whose compute was issued before
            self._coming[number] = (
                chunk,
                self._engine.copy([(place, _bytes(chunk))], after=[there, self._engine.mark()]),
            )
        return self._coming[number]


def waiting_for(backend: Backend | None, count: int, nbytes: int) -> Waiting:
    """On the host of ``backend``; on the device for None, and where the device computes in host memory anyway."""
    return Here(count) if backend is None or backend.engine.unified else OnHost(backend, count, nbytes)


class WaitingStates(LazyTensor):
    """All chunks as one tensor [B, L, H], which is only made where something other than a layer touches it."""

    waiting: Waiting
    count: int

    @classmethod
    def of(cls, waiting: Waiting, count: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Self:
        """The ``count`` chunks of ``waiting``."""
        made = cls.shaped(shape, dtype, device)
        made.waiting, made.count = waiting, count
        return made

    def computed(self) -> Tensor:
        return torch.cat([self.waiting.take(number) for number in range(self.count)], 1)


def _bytes(chunk: Tensor) -> Tensor:
    return chunk.view(-1).view(torch.uint8)
