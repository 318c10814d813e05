"""The product with weights in tiles of 64 rows: whole numbers, multiplied as such, whose sums are scaled.

Neighbouring columns of a row, ``SPAN`` of them, have one scale and one zero: ``weight = code * scale + zero``. So the
sum over a span of ``x * weight`` is ``scale * sum(x * code) + zero * sum(x)``. Codes are from -128 to 127, which
bfloat16 and float16 hold exactly: they reach the tensor cores without a rounding.

A format gives two jitted functions: ``codes(parts, row, column, n, k, BLOCK_N, BLOCK_K, SPAN, FOLD)`` returns int32
[BLOCK_N, BLOCK_K], of rows from ``row`` on and of the columns that ``columns_of`` lists, from ``column`` on; and
``scales(parts, row, column, n, k, BLOCK_N, SPANS, SPAN)`` the scales and the zeros, each float32 [SPANS, BLOCK_N]. Past
the last column both are finite.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.blocks import blocks_of_tiles
from tierstore.kernels.launch import NARROW, launch, load_columns, store_block


@triton.jit
def columns_of(BLOCK_K: tl.constexpr, SPAN: tl.constexpr, FOLD: tl.constexpr) -> tl.tensor:
    """Which columns a block has, int32 [BLOCK_K], counted from its first.

    They are listed by [FOLD, spans, SPAN // FOLD]. Threads are laid over a block FOLD times, so that the columns which
    one of them has are all of one span, and can be added before they are scaled.
    """
    place = tl.arange(0, BLOCK_K)
    piece: tl.constexpr = SPAN // FOLD
    inside = place % (BLOCK_K // FOLD)
    return inside // piece * SPAN + place // (BLOCK_K // FOLD) * piece + inside % piece


@triton.jit
def load_words(
    tiles: tl.tensor,
    width: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    FOLD: tl.constexpr,
) -> tl.tensor:
    """int32 [BLOCK_N // 64, BLOCK_K, 8] of [np // 64, width, 8]: for each column of a tile 64 nibbles.

    Byte ``j`` of the 32 has row ``j`` in its low half and row ``32 + j`` in its high half.
    """
    tile = tl.arange(0, BLOCK_N // 64)[:, None, None]
    columns = (column + columns_of(BLOCK_K, SPAN, FOLD))[None, :, None]
    words = tl.arange(0, 8)[None, None, :]
    start = tiles + (row // 64).to(tl.int64) * (width * 8)
    mask = (columns < k) & (row + tile * 64 < n)
    return tl.load(start + (tile * (width * 8) + columns * 8 + words), mask=mask, other=0)


@triton.jit
def rows_of(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """int32 [tiles * 64, columns], the code in the lowest bits, of words as ``load_words`` gives them.

    Byte ``j`` of ``low`` is row ``j`` of its tile, that of ``high`` row ``32 + j``. Nothing goes from thread to thread.
    """
    halves = tl.join(low, high)
    pairs = tl.join(halves, halves >> 16)
    single = tl.join(pairs, pairs >> 8)  # [tile, column, word, half, pair of bytes, byte]
    rows: tl.constexpr = low.shape[0] * 64
    return single.permute(0, 3, 2, 4, 5, 1).reshape(rows, low.shape[1])


@triton.jit
def _spread(scales: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """[rows, COLUMNS] of [spans, rows]: for each column what its span has."""
    spans: tl.constexpr = scales.shape[0]
    rows: tl.constexpr = scales.shape[1]
    return scales.trans()[:, :, None].broadcast_to(rows, spans, COLUMNS // spans).reshape(rows, COLUMNS)


@triton.jit
def _one_row(
    x: tl.tensor,
    parts: tl.tuple,
    out: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    width: tl.tensor,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """All in float32."""
    fold: tl.constexpr = SPAN // 16
    folded: tl.constexpr = BLOCK_K // fold
    row = tl.program_id(0) * BLOCK_N
    start = tl.program_id(1) * width
    sums = tl.zeros((BLOCK_N, folded), tl.float32)
    for column in range(start, min(start + width, k), BLOCK_K):
        columns = column + columns_of(BLOCK_K, SPAN, fold)
        values = tl.load(x + columns, mask=columns < k, other=0).to(tl.float32)
        codes = CODES(parts, row, column, n, k, BLOCK_N, BLOCK_K, SPAN, fold).to(tl.float32)
        scales, zeros = SCALES(parts, row, column, n, k, BLOCK_N, BLOCK_K // SPAN, SPAN)
        products = tl.sum((codes * values[None, :]).reshape(BLOCK_N, fold, folded), axis=1)
        total = tl.sum(values.reshape(fold, folded), axis=0)
        sums += products * _spread(scales, folded) + total[None, :] * _spread(zeros, folded)
    rows = row + tl.arange(0, BLOCK_N)
    where = out + tl.program_id(1).to(tl.int64) * n + rows
    tl.store(where, tl.sum(sums, axis=1).to(out.dtype.element_ty), mask=rows < n)


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
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A step is one span, whose products are added in float32 and then scaled."""
    blocks = tl.cdiv(m, BLOCK_M)  # those of the same weights follow each other
    row = tl.program_id(0) // blocks * BLOCK_N
    first = tl.program_id(0) % blocks * BLOCK_M
    start = tl.program_id(1) * width
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for column in range(start, min(start + width, k), BLOCK_K):
        values = load_columns(x, x_stride, first, column + tl.arange(0, BLOCK_K), m, k, BLOCK_M)
        codes = CODES(parts, row, column, n, k, BLOCK_N, BLOCK_K, SPAN, 1).to(tl.float32).to(values.dtype)
        scales, zeros = SCALES(parts, row, column, n, k, BLOCK_N, 1, SPAN)
        products = tl.dot(codes, values, input_precision="ieee")
        total = tl.sum(values.to(tl.float32), axis=0)
        sums += products * _spread(scales, 1) + total[None, :] * _spread(zeros, 1)
    store_block(out, sums, first, row, m, n)


def as_words(part: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """The same memory as wider numbers; where there is none, the part itself."""
    return part.view(dtype) if part.numel() else part


def multiply(x: Tensor, parts: tuple[Tensor | int, ...], n: int, span: int, codes: Any, scales: Any) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] and the W [n, k] that ``codes`` and ``scales`` make
    of ``parts``; ``span`` is 32 or 64. ``launch`` says what is allocated."""
    m, k = x.shape
    if m == 0 or n == 0 or k == 0:
        return x.new_zeros((m, n))
    blocks = blocks_of_tiles(m, n, k, span, exact=x.dtype not in NARROW)
    return launch(_one_row, _many_rows, x, parts, n, blocks, CODES=codes, SCALES=scales, SPAN=span)
