"""The product with fp4 (NVFP4) weights on a GPU: see ``reference.py`` for what it computes."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.fours import load_fours, spread
from tierstore.kernels.rows import load_block, multiply
from tierstore.kernels.small_floats import e4m3


@triton.jit
def _weights(
    parts: tl.tuple,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    codes, scales = parts
    groups = tl.cdiv(k, 16)
    scale = e4m3(load_block(scales, row, column // 16, n, groups, BLOCK_N, BLOCK_K // 16))
    return load_fours(codes, row, column, n, groups * 16, BLOCK_N, BLOCK_K) * spread(scale, 16)


def matmul(x: Tensor, codes: Tensor, scales: Tensor, scale: Tensor, n: int) -> Tensor:
    """What ``reference.matmul`` computes. On a GPU; parts are contiguous, rows of ``x`` may be apart."""
    return multiply(x, (codes, scales.view(torch.uint8)), scale, n, _weights)
