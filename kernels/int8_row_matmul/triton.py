"""The product with int8-row weights on a GPU: see ``reference.py`` for what it computes."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.rows import load_block, multiply


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
    return load_block(codes, row, column, n, k, BLOCK_N, BLOCK_K).to(tl.float32)


def matmul(x: Tensor, codes: Tensor, scales: Tensor, n: int) -> Tensor:
    """What ``reference.matmul`` computes. On a GPU; parts are contiguous, rows of ``x`` may be apart."""
    return multiply(x, (codes,), scales, n, _weights)
