"""Packing and unpacking of pages on a GPU: see ``reference.py`` for what a cell holds, bit for bit.

A program has one head of one page, of keys or of values. Nothing is fused that the reference rounds in between.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.kv_pages.codes import BYTES, CODES, E2m1
from tierstore.kernels.kv_pages.layout import BY_TOKEN, CODE_BITS, layout_of
from tierstore.kernels.kv_pages.rounding import (
    as_held,
    few_bits,
    is_finite,
    scaled,
    store_first,
    store_held,
    to_e4m3,
    to_whole,
    usable,
    values_of,
)
from tierstore.kernels.small_floats import e4m3

_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _load(
    x: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    heads: tl.tensor,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """float32 [TOKENS, BLOCK] of the program's page and head; 0 past DIM."""
    page, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    rows, columns = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    start = x + page.to(tl.int64) * page_stride + head * head_stride
    return tl.load(start + rows * token_stride + columns, mask=columns < DIM, other=0).to(tl.float32)


@triton.jit
def _pack_bytes(
    x: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cells: tl.tensor,
    cell_stride: tl.tensor,
    codes_at: tl.tensor,
    scales_at: tl.tensor,
    first_at: tl.tensor,
    heads: tl.tensor,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    FLOAT: tl.constexpr,
) -> None:
    """A scale for each token."""
    tile = _load(x, page_stride, token_stride, head_stride, heads, TOKENS, DIM, BLOCK)
    good = tl.min(is_finite(tile).to(tl.int32), axis=1, keep_dims=True) > 0
    reach = tl.max(tl.abs(tile), axis=1, keep_dims=True)
    scales, good = usable(reach * (1 / MOST), good)
    numbers = tl.minimum(tl.maximum(scaled(tile, scales, good), -MOST), MOST)
    codes = to_e4m3(numbers) if FLOAT else to_whole(numbers).to(tl.int32)
    page, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    cell = cells + page.to(tl.int64) * cell_stride
    rows, columns = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    start = cell + codes_at + head * (TOKENS * DIM)
    tl.store(start + rows * DIM + columns, (codes & 255).to(tl.uint8), mask=columns < DIM)
    start = (cell + scales_at).to(tl.pointer_type(tl.int16), bitcast=True) + head * TOKENS
    store_held(start + rows, scales, good, rows < TOKENS)


@triton.jit
def _pack_range(
    x: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cells: tl.tensor,
    cell_stride: tl.tensor,
    codes_at: tl.tensor,
    scales_at: tl.tensor,
    first_at: tl.tensor,
    heads: tl.tensor,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    SHARE: tl.constexpr,
) -> None:
    """A scale and a zero for each channel over all tokens but the first, or for each token."""
    axis: tl.constexpr = 0 if BY_CHANNEL else 1
    each: tl.constexpr = 8 // BITS
    count: tl.constexpr = DIM if BY_CHANNEL else TOKENS
    tile = _load(x, page_stride, token_stride, head_stride, heads, TOKENS, DIM, BLOCK)
    rows, columns = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    counted = (columns < DIM) & ((rows > 0) | (not BY_CHANNEL))
    sound = is_finite(tile)
    fine = tl.min((sound | ~counted).to(tl.int32), axis=axis, keep_dims=True) > 0
    low = tl.min(tl.where(counted & sound, tile, float("inf")), axis=axis, keep_dims=True)
    high = tl.max(tl.where(counted & sound, tile, float("-inf")), axis=axis, keep_dims=True)
    middle, half = low * 0.5 + high * 0.5, (high - low) * (0.5 * SHARE)
    zeros = middle if FLOAT else middle - half
    scales, good = usable(half * (1 / MOST if FLOAT else 2 / MOST), fine & is_finite(zeros))
    zeros = as_held(zeros)
    good = good & is_finite(zeros)
    codes = few_bits(tile, scales, zeros, good, FLOAT, MOST).reshape(each, TOKENS // each, BLOCK)
    shifts = tl.arange(0, each)[:, None, None] * BITS
    packed = tl.sum(codes << shifts, axis=0).to(tl.uint8)
    page, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    cell = cells + page.to(tl.int64) * cell_stride
    start = cell + codes_at + head * (TOKENS // each * DIM)
    tl.store(start + tl.arange(0, TOKENS // each)[:, None] * DIM + columns, packed, mask=columns < DIM)
    start = (cell + scales_at).to(tl.pointer_type(tl.int16), bitcast=True) + head * (2 * count)
    places = columns if BY_CHANNEL else rows
    store_held(start + places, scales, good, places < count)
    store_held(start + count + places, zeros, good, places < count)
    start = (cell + first_at).to(tl.pointer_type(tl.int16), bitcast=True) + head * DIM
    store_first(start + columns + 0 * rows, tile, (rows == 0) & (columns < DIM))


@triton.jit
def _unpack(
    cells: tl.tensor,
    cell_stride: tl.tensor,
    out: tl.tensor,
    codes_at: tl.tensor,
    scales_at: tl.tensor,
    first_at: tl.tensor,
    pages: tl.tensor,
    heads: tl.tensor,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
) -> None:
    """Head by head, page by page, to ``out`` [heads, pages, TOKENS, DIM]."""
    each: tl.constexpr = 8 // BITS
    height: tl.constexpr = TOKENS // each
    count: tl.constexpr = DIM if BY_CHANNEL else TOKENS
    page, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    cell = cells + page.to(tl.int64) * cell_stride
    rows, columns = tl.arange(0, height)[:, None], tl.arange(0, BLOCK)[None, :]
    packed = tl.load(cell + codes_at + head * (height * DIM) + rows * DIM + columns, mask=columns < DIM, other=0)
    scales = (cell + scales_at).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    first = (cell + first_at).to(tl.pointer_type(tl.bfloat16), bitcast=True) + head * DIM
    into = out + (head.to(tl.int64) * pages + page) * (TOKENS * DIM)
    for piece in tl.static_range(each):
        tokens = rows + piece * height
        places = columns if BY_CHANNEL else tokens
        if BITS == 8:
            codes = e4m3(packed) if FLOAT else packed.to(tl.int8, bitcast=True).to(tl.float32)
            values = codes * tl.load(scales + head * TOKENS + tokens).to(tl.float32)
        else:
            codes = (packed.to(tl.int32) >> (piece * BITS)) & ((1 << BITS) - 1)
            start = scales + head * (2 * count) + places
            scale = tl.load(start, mask=places < count, other=0).to(tl.float32)
            zero = tl.load(start + count, mask=places < count, other=0).to(tl.float32)
            values = values_of(codes, FLOAT) * scale + zero
            if piece == 0:
                exact = tl.load(first + columns, mask=columns < DIM, other=0).to(tl.float32)
                values = tl.where(tokens == 0, exact, values)
        tl.store(into + tokens * DIM + columns, values.to(out.dtype.element_ty), mask=columns < DIM)


def pack(name: str, keys: Tensor, values: Tensor, cells: Tensor) -> None:
    """What ``reference.pack`` does, on a GPU, for pages of a power of two of tokens. Launches on the current stream;
    allocates nothing but a copy of states whose last axis is not dense."""
    _, tokens, heads, key_dim = keys.shape
    at = layout_of(name, heads, tokens, key_dim, values.shape[3])
    for states, by_channel, codes_at, scales_at, first_at in (
        (keys, True, at.key_codes, at.key_scales, at.key_first),
        (values, False, at.value_codes, at.value_scales, at.value_first),
    ):
        pages, _, _, dim = states.shape
        if states.numel() == 0:
            continue
        states = states if states.stride(3) == 1 else states.contiguous()
        places = (*states.stride()[:3], cells, cells.stride(0), codes_at, scales_at, first_at, heads)
        sizes: dict[str, Any] = {"TOKENS": tokens, "DIM": dim, "BLOCK": triton.next_power_of_2(dim)}
        with cast(Any, torch.cuda).device_of(cells):
            if name in BY_TOKEN:
                sizes |= {"MOST": BYTES[name].most, "FLOAT": BYTES[name].dtype.is_floating_point}
                _pack_bytes[(pages * heads,)](states, *places, **sizes, **_OPTIONS)
            else:
                code = CODES[name]
                sizes |= {"MOST": code.most, "FLOAT": isinstance(code, E2m1), "BITS": CODE_BITS[name]}
                sizes |= {"BY_CHANNEL": by_channel, "SHARE": code.share, "num_warps": 8}
                _pack_range[(pages * heads,)](states, *places, **sizes, **_OPTIONS)


def unpack(
    name: str, cells: Tensor, heads: int, tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What ``reference.unpack`` gives, on a GPU. Allocates it, and launches on the current stream."""
    at = layout_of(name, heads, tokens, key_dim, value_dim)
    if cells.stride(1) != 1:
        cells = cells.contiguous()
    found = []
    for dim, by_channel, *places in (
        (key_dim, True, at.key_codes, at.key_scales, at.key_first),
        (value_dim, False, at.value_codes, at.value_scales, at.value_first),
    ):
        out = torch.empty((heads, len(cells), tokens, dim), dtype=dtype, device=cells.device)
        sizes: dict[str, Any] = {"TOKENS": tokens, "DIM": dim, "BLOCK": triton.next_power_of_2(dim)}
        sizes |= {"FLOAT": name in ("fp8", "fp4"), "BITS": CODE_BITS[name], "BY_CHANNEL": by_channel}
        with cast(Any, torch.cuda).device_of(cells):
            if out.numel():
                grid = (len(cells) * heads,)
                _unpack[grid](cells, cells.stride(0), out, *places, len(cells), heads, **sizes, **_OPTIONS)
        found.append(out.permute(1, 2, 0, 3))
    return found[0], found[1]
