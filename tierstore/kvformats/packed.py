"""Pages of rotated keys and values in codes of few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.kernels.kv_pages import reference
from tierstore.kernels.kv_pages.layout import layout_of
from tierstore.kernels.kv_pages.rotation import rotate
from tierstore.kvformats.format import KvShape

TOKENS_STEP = 4
"""Pages have a multiple of so many tokens: of int2, a byte has 4."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One of the formats of ``kernels/kv_pages/reference.py``, which says what stands in its cells."""

    name: str
    recent_tokens: int
    plain: bool = False

    def cell_nbytes(self, shape: KvShape, dtype: torch.dtype) -> int:
        tokens = shape.page_tokens
        if tokens < 2 * TOKENS_STEP or tokens % TOKENS_STEP:
            raise ModuleError(
                f"pages of {tokens} tokens cannot be packed as {self.name}: page_tokens must be a multiple of "
                f"{TOKENS_STEP}, from {2 * TOKENS_STEP} on"
            )
        return layout_of(self.name, shape.heads, tokens, shape.key_dim, shape.value_dim).nbytes

    def pack(self, keys: Tensor, values: Tensor, into: Tensor) -> None:
        reference.pack(self.name, rotate(keys), rotate(values), into)

    def unpack(self, cells: Tensor, shape: KvShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return reference.unpack(self.name, cells, shape.heads, shape.page_tokens, shape.key_dim, shape.value_dim, dtype)

    def rotate_query(self, q: Tensor) -> Tensor:
        return rotate(q)

    def unrotate_output(self, out: Tensor) -> Tensor:
        return rotate(out)
