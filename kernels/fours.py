"""Weights of 4 bits that are stored row by row, two in a byte, with a scale for each group of columns."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from tierstore.kernels.rows import load_block
from tierstore.kernels.small_floats import e2m1


@triton.jit
def load_fours(
    codes: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """e2m1 values as float32 [BLOCK_N, BLOCK_K] of uint8 [n, width // 2]: the low half of a byte is the even column."""
    both = load_block(codes, row, column // 2, n, width // 2, BLOCK_N, BLOCK_K // 2).to(tl.int32)
    return e2m1(tl.join(both << 28, both << 24)).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def spread(scales: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """[rows, groups * GROUP] of [rows, groups]: for each column what its group has."""
    rows: tl.constexpr = scales.shape[0]
    groups: tl.constexpr = scales.shape[1]
    return scales[:, :, None].broadcast_to(rows, groups, GROUP).reshape(rows, groups * GROUP)
