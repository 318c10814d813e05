"""The product with int8 weights on a GPU: see ``reference.py`` for what it computes."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.int8_matmul.reference import GROUP
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
    high, low, _, _ = parts
    width = tl.cdiv(k, SPAN) * SPAN
    upper = load_words(high, width, row, column, n, k, BLOCK_N, BLOCK_K, SPAN, FOLD)
    lower = load_words(low, width, row, column, n, k, BLOCK_N, BLOCK_K, SPAN, FOLD)
    first = ((upper << 4) & -0x0F0F0F10) | (lower & 0x0F0F0F0F)
    second = (upper & -0x0F0F0F10) | ((lower >> 4) & 0x0F0F0F0F)
    flip = -0x7F7F7F80  # the highest bit of each byte: as a number with a sign, it then is q - 128
    return rows_of(first ^ flip, second ^ flip).to(tl.int8).to(tl.int32)


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
    _, _, scales, steps = parts
    height, groups = tl.cdiv(n, 64) * 64, tl.cdiv(k, SPAN)
    rows = row + tl.arange(0, BLOCK_N)
    group = column // SPAN + tl.arange(0, SPANS)
    places = (rows // 64 * groups)[None, :].to(tl.int64) * 64 + (group[:, None] * 64 + (rows % 64)[None, :])
    mask = (group < groups)[:, None] & (rows < height)[None, :]
    pairs = tl.load(scales + places, mask=mask, other=0).to(tl.int32)
    step = tl.load(steps + rows, mask=rows < height, other=0)
    scale = (step[None, :] * (pairs & 255).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
    zero = 1.25 * scale * (((pairs >> 8) & 255) - 128).to(tl.float32)
    zero = tl.div_rn(zero, 17.0).to(tl.bfloat16).to(tl.float32)
    return scale, 17 * zero - 8 * scale


def matmul(x: Tensor, high: Tensor, low: Tensor, scales: Tensor, steps: Tensor, n: int) -> Tensor:
    """What ``reference.matmul`` computes. On a GPU; parts are contiguous, rows of ``x`` may be apart."""
    parts = (as_words(high), as_words(low), as_words(scales, torch.int16), steps)
    return multiply(x, parts, n, GROUP, _codes, _scales)
