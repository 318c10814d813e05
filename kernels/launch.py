"""What the kernels have in common: how they are run, read their input, leave their output, and how splits are added."""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.blocks import Blocks

NARROW = (torch.bfloat16, torch.float16)
"""What tensor cores multiply exactly and add in float32. All else is multiplied as float32."""
_AT_ONCE = 1024
FUSED = {"enable_fp_fusion": True}
"""How every kernel is launched: a product and its sum in one instruction. From 3.10 on Triton does so when told."""


@triton.jit
def _add_splits(partial: tl.tensor, out: tl.tensor, count: tl.tensor, splits: tl.tensor, AT_ONCE: tl.constexpr) -> None:
    """``out`` [count] of ``partial`` float32 [splits, count], always added in the same order."""
    places = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    sums = tl.zeros((AT_ONCE,), tl.float32)
    for _ in range(splits):
        sums += tl.load(partial + places, mask=places < count, other=0)
        partial += count
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=places < count)


@triton.jit
def load_columns(
    x: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    columns: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """``x`` [m, k] transposed: its ``columns`` by BLOCK_M of its rows from ``first`` on, 0 where it has none."""
    places = tl.arange(0, BLOCK_M)[None, :]
    mask = (columns < k)[:, None] & (first + places < m)
    return tl.load(x + first.to(tl.int64) * stride + (places * stride + columns[:, None]), mask=mask, other=0)


@triton.jit
def store_block(out: tl.tensor, sums: tl.tensor, first: tl.tensor, row: tl.tensor, m: tl.tensor, n: tl.tensor) -> None:
    """``sums`` [n rows, m rows] into its place, from (``first``, ``row``) on, in ``out`` [splits, m, n]."""
    rows, places = tl.arange(0, sums.shape[0])[:, None], tl.arange(0, sums.shape[1])[None, :]
    start = out + (tl.program_id(1).to(tl.int64) * m + first) * n + row
    tl.store(start + (places * n + rows), sums.to(out.dtype.element_ty), mask=(row + rows < n) & (first + places < m))


def launch(one_row: Any, many_rows: Any, x: Tensor, parts: Any, n: int, blocks: Blocks, **constants: Any) -> Tensor:
    """The product [m, n] of ``x`` [m, k], in its dtype, by one of two kernels and their ``constants``.

    ``one_row(x, parts, out, n, k, width)`` and ``many_rows(x, x_stride, parts, out, m, n, k, width)``, whose program
    (i, s) has block ``i`` of the product and the columns from ``s * width`` on, and writes to ``out`` [splits, m, n].
    Allocates the product and, where columns are split, float32 [splits, m, n]. Launches on the current stream.
    """
    if x.dtype not in (*NARROW, torch.float32):
        return launch(one_row, many_rows, x.float(), parts, n, blocks, **constants).to(x.dtype)
    m, k = x.shape
    product = x.new_empty((m, n))
    if x.stride(1) != 1:
        x = x.contiguous()
    out = product if blocks.splits == 1 else x.new_empty((blocks.splits, m, n), dtype=torch.float32)
    grid = (blocks.programs(m, n), blocks.splits)
    constants |= {"BLOCK_N": blocks.n, "BLOCK_K": blocks.k, "num_warps": blocks.warps, **FUSED}
    with cast(Any, torch.cuda).device_of(x):
        if m == 1:
            one_row[grid](x, parts, out, n, k, blocks.width, **constants)
        else:
            many_rows[grid](x, x.stride(0), parts, out, m, n, k, blocks.width, BLOCK_M=blocks.m, **constants)
        if out is not product:
            count = m * n
            _add_splits[(triton.cdiv(count, _AT_ONCE),)](out, product, count, blocks.splits, _AT_ONCE, **FUSED)
    return product
