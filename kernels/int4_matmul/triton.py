"""The product with int4 weights on a GPU: see ``reference.py`` for what it computes."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.tiles import as_words, load_words, multiply, rows_of


@triton.jit
def _codes(
    parts: tl.tuple,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    FOLD: tl.constexpr,
) -> tl.tensor:
    codes, _, group = parts
    width = tl.cdiv(k, group) * group
    words = load_words(codes, width, row, column, n, k, BLOCK_N, BLOCK_K, SPAN, FOLD)
    words ^= -0x77777778  # flips the highest bit of each nibble: as a number with a sign, it then is q - 8
    return (rows_of(words, words >> 4) << 28) >> 28


@triton.jit
def _scales(
    parts: tl.tuple,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BLOCK_N: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tuple:
    _, scales, group = parts
    height = tl.cdiv(n, 64) * 64
    rows = row + tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, SPANS) * SPAN
    places = (columns // group).to(tl.int64)[:, None] * height + rows[None, :]
    pairs = tl.load(scales + places, mask=(columns < k)[:, None] & (rows < height)[None, :], other=0)
    # A bfloat16 is the upper half of a float32.
    return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -0x10000).to(tl.float32, bitcast=True)


def matmul(x: Tensor, codes: Tensor, scales: Tensor, n: int, group: int) -> Tensor:
    """What ``reference.matmul`` computes. On a GPU; parts are contiguous, rows of ``x`` may be apart."""
    return multiply(x, (as_words(codes), as_words(scales), group), n, min(group, 64), _codes, _scales)
