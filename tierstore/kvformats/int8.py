"""int8: keys by channel over a page, values by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.kernels.kv_pages import reference
from tierstore.kvformats.format import KvShape


@dataclass(frozen=True, slots=True)
class Int8:
    """See ``kernels/kv_pages/reference.py`` for the cell."""

    name: str = "int8"
    plain: bool = False
    recent_tokens: int = 64

    def cell_nbytes(self, shape: KvShape, dtype: torch.dtype) -> int:
        return reference.int8_layout(shape.heads, shape.page_tokens, shape.key_dim, shape.value_dim).nbytes

    def pack(self, keys: Tensor, values: Tensor, into: Tensor) -> None:
        reference.pack_int8(keys, values, into)

    def unpack(self, cells: Tensor, shape: KvShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return reference.unpack_int8(cells, shape.heads, shape.page_tokens, shape.key_dim, shape.value_dim, dtype)

    def rotate_query(self, q: Tensor) -> Tensor:
        return q

    def unrotate_output(self, out: Tensor) -> Tensor:
        return out
