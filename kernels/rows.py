"""The product with weights that are stored row by row: made floats in registers, and multiplied there.

A format gives ``weights(parts, row, column, n, k, BLOCK_N, BLOCK_K)``, a jitted function that returns float32 [BLOCK_N,
BLOCK_K]: the weights of rows from ``row`` on and columns from ``column`` on, and what is finite past the last column.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.blocks import blocks_of_rows
from tierstore.kernels.launch import NARROW, launch, load_columns, store_block


@triton.jit
def load_block(
    start: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """[HEIGHT, WIDTH] from (``row``, ``column``) on of a matrix [height, width], 0 where that has none."""
    rows, columns = tl.arange(0, HEIGHT)[:, None], column + tl.arange(0, WIDTH)[None, :]
    mask = (row + rows < height) & (columns < width)
    return tl.load(start + row.to(tl.int64) * width + (rows * width + columns), mask=mask, other=0)


@triton.jit
def _factors(
    factors: tl.tensor, row: tl.tensor, n: tl.tensor, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    rows = row + tl.arange(0, BLOCK_N)
    return tl.load(factors + rows * STRIDE, mask=rows < n, other=0).to(tl.float32)


@triton.jit
def _one_row(
    x: tl.tensor,
    parts: tl.tuple,
    out: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    width: tl.tensor,
    WEIGHTS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """All in float32."""
    packed, factors = parts
    row = tl.program_id(0) * BLOCK_N
    start = tl.program_id(1) * width
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for column in range(start, min(start + width, k), BLOCK_K):
        columns = column + tl.arange(0, BLOCK_K)
        values = tl.load(x + columns, mask=columns < k, other=0).to(tl.float32)
        sums += WEIGHTS(packed, row, column, n, k, BLOCK_N, BLOCK_K) * values[None, :]
    total = tl.sum(sums, axis=1)
    if factors is not None:
        total *= _factors(factors, row, n, STRIDE, BLOCK_N)
    rows = row + tl.arange(0, BLOCK_N)
    tl.store(out + tl.program_id(1).to(tl.int64) * n + rows, total.to(out.dtype.element_ty), mask=rows < n)


@triton.jit(do_not_specialize=["m"])
def _many_rows(
    x: tl.tensor,
    x_stride: tl.tensor,
    parts: tl.tuple,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    width: tl.tensor,
    WEIGHTS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Weights are rounded to the dtype of ``x``, which changes none that is in its range; sums are float32."""
    packed, factors = parts
    blocks = tl.cdiv(m, BLOCK_M)  # those of the same weights follow each other
    row = tl.program_id(0) // blocks * BLOCK_N
    first = tl.program_id(0) % blocks * BLOCK_M
    start = tl.program_id(1) * width
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for column in range(start, min(start + width, k), BLOCK_K):
        values = load_columns(x, x_stride, first, column + tl.arange(0, BLOCK_K), m, k, BLOCK_M)
        weights = WEIGHTS(packed, row, column, n, k, BLOCK_N, BLOCK_K).to(values.dtype)
        sums = tl.dot(weights, values, sums, input_precision="ieee")
    if factors is not None:
        sums *= _factors(factors, row, n, STRIDE, BLOCK_N)[:, None]
    store_block(out, sums, first, row, m, n)


def multiply(x: Tensor, packed: tuple[Tensor, ...], factors: Tensor | None, n: int, weights: Any) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] and the W [n, k] that ``weights`` makes of
    ``packed``.

    Each row of W is multiplied by its one of ``factors`` besides, [n, 1], or by the same one, [1, 1]. ``launch`` says
    what is allocated.
    """
    m, k = x.shape
    if m == 0 or n == 0 or k == 0:
        return x.new_zeros((m, n))
    stride = 0 if factors is None or factors.numel() == 1 else 1
    blocks = blocks_of_rows(m, n, k, exact=x.dtype not in NARROW)
    return launch(_one_row, _many_rows, x, (packed, factors), n, blocks, WEIGHTS=weights, STRIDE=stride)
