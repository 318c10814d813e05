"""The product with fp8 weights on a GPU: see ``reference.py`` for what it computes."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    (codes,) = parts
    return e4m3(load_block(codes, row, column, n, k, BLOCK_N, BLOCK_K))


def matmul(x: Tensor, codes: Tensor, scales: Tensor, n: int) -> Tensor:
    """What ``reference.matmul`` computes. On a GPU; parts are contiguous, rows of ``x`` may be apart."""
    return multiply(x, (codes.view(torch.uint8),), scales, n, _weights)
