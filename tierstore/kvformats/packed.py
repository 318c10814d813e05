"""Pages of rotated keys and values in codes of few bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.kernels.cards import runs_triton
from tierstore.kernels.kv_pages import reference
from tierstore.kernels.kv_pages.layout import layout_of
from tierstore.kernels.kv_pages.rotation import rotate
from tierstore.kvformats.format import KvShape

LEAST_TOKENS = 8
"""Of a page: of int2, a byte has 4."""
AT_ONCE = 32
"""Pages that are packed together: what that needs besides, a few times their size, is bounded."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One of the formats of ``kernels/kv_pages/reference.py``, which says what stands in its cells."""

    name: str
    recent_tokens: int
    plain: bool = False

    def cell_nbytes(self, shape: KvShape, dtype: torch.dtype) -> int:
        tokens = shape.page_tokens
        if tokens < LEAST_TOKENS or tokens & (tokens - 1):
            raise ModuleError(
                f"pages of {tokens} tokens cannot be packed as {self.name}: page_tokens must be a power of two from "
                f"{LEAST_TOKENS} on"
            )
        return layout_of(self.name, shape.heads, tokens, shape.key_dim, shape.value_dim).nbytes

    def pack(self, keys: Tensor, values: Tensor, into: Tensor) -> None:
        for start in range(0, len(into), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            _kernels(into.device).pack(self.name, rotate(keys[some].float()), rotate(values[some].float()), into[some])

    def unpack(self, cells: Tensor, shape: KvShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sizes = (shape.heads, shape.page_tokens, shape.key_dim, shape.value_dim)
        keys, values = _kernels(cells.device).unpack(self.name, cells, *sizes, dtype)
        return keys, values

    def rotate_query(self, q: Tensor) -> Tensor:
        return rotate(q)

    def unrotate_output(self, out: Tensor) -> Tensor:
        return rotate(out)


@cache
def _kernels(device: torch.device) -> Any:
    """Triton's where ``device`` runs them."""
    return import_module("tierstore.kernels.kv_pages.triton") if runs_triton(device) else reference
