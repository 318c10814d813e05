"""The product with mxfp4 weights on a GPU: see ``reference.py`` for what it computes."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.fours import load_fours, spread
from tierstore.kernels.rows import load_block, multiply
from tierstore.kernels.small_floats import e8m0


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
    groups = tl.cdiv(k, 32)
    scale = e8m0(load_block(scales, row, column // 32, n, groups, BLOCK_N, BLOCK_K // 32))
    return load_fours(codes, row, column, n, groups * 32, BLOCK_N, BLOCK_K) * spread(scale, 32)


def matmul(x: Tensor, codes: Tensor, scales: Tensor, n: int) -> Tensor:
    """What ``reference.matmul`` computes. On a GPU; parts are contiguous, rows of ``x`` may be apart."""
    return multiply(x, (codes, scales.view(torch.uint8)), None, n, _weights)
