"""Pages as they are: in the model's own dtype, or rounded to bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.kvformats.format import KvShape


@dataclass(frozen=True, slots=True)
class Raw:
    """Keys [T, H, Dk], then values [T, H, Dv], in ``dtype``."""

    name: str
    dtype: torch.dtype
    plain: bool
    recent_tokens: int = 0

    def cell_nbytes(self, shape: KvShape, dtype: torch.dtype) -> int:
        return shape.page_tokens * shape.heads * (shape.key_dim + shape.value_dim) * self.dtype.itemsize

    def pack(self, keys: Tensor, values: Tensor, into: Tensor) -> None:
        at = 0
        for states in (keys, values):
            nbytes = states.shape[1:].numel() * self.dtype.itemsize
            into[:, at : at + nbytes].view(self.dtype).view(states.shape).copy_(states)
            at += nbytes

    def unpack(self, cells: Tensor, shape: KvShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        found, at = [], 0
        for dim in (shape.key_dim, shape.value_dim):
            size = (shape.page_tokens, shape.heads, dim)
            nbytes = torch.Size(size).numel() * self.dtype.itemsize
            found.append(cells[:, at : at + nbytes].view(self.dtype).view(-1, *size).to(dtype))
            at += nbytes
        return found[0], found[1]

    def rotate_query(self, q: Tensor) -> Tensor:
        return q

    def unrotate_output(self, out: Tensor) -> Tensor:
        return out
