"""Memory for the pages of a group, on their way to attention."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from tierstore.kvformats.format import KvShape

States = tuple[Tensor, Tensor]


class Room:
    """Memory of ``dtype`` for pages: ``memory``, bytes, used again and again; or new memory where None is given."""

    def __init__(self, shape: KvShape, dtype: torch.dtype, device: torch.device, memory: Tensor | None = None) -> None:
        self.dtype = dtype
        self._shapes = [(shape.page_tokens, shape.heads, dim) for dim in (shape.key_dim, shape.value_dim)]
        self._sizes = [torch.Size(each).numel() for each in self._shapes]
        self._device = device
        self._memory = None if memory is None else memory[: memory.numel() // 8 * 8].view(dtype)

    @property
    def most(self) -> int:
        """How many pages fit, at least 1."""
        return sys.maxsize if self._memory is None else max(self._memory.numel() // sum(self._sizes), 1)

    def pages(self, count: int) -> States:
        """Keys [count, page_tokens, heads, key_dim] and values, contiguous. With ``memory``, until the next call."""
        sizes = [count * size for size in self._sizes]
        flat = self._memory
        if flat is None:
            flat = torch.empty(sum(sizes), dtype=self.dtype, device=self._device)
        keys, values = flat[: sizes[0]], flat[sizes[0] : sum(sizes)]
        return keys.view(count, *self._shapes[0]), values.view(count, *self._shapes[1])
