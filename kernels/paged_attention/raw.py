"""Tokens of pages that are not packed: written to their places, and read from them, keys and values in one launch."""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.launch import FUSED

_AT_ONCE, _ALIGN = 1024, 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _move_one(
    states: tl.tensor,
    page: tl.tensor,
    at: tl.tensor,
    head_stride: tl.tensor,
    here: tl.tensor,
    WRITE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Token ``at`` of the piece at address ``page``, if it is ``here``: its heads are ``head_stride`` apart from
    ``states`` on."""
    block: tl.constexpr = AT_ONCE if HEADS * DIM > AT_ONCE else triton.next_power_of_2(HEADS * DIM)
    piece = page.to(tl.pointer_type(states.dtype.element_ty), bitcast=True) + at * (HEADS * DIM)
    count = tl.where(here, HEADS * DIM, 0)
    for first in tl.static_range(0, HEADS * DIM, block):
        place = first + tl.arange(0, block)
        mask = place < count
        there = states + (place // DIM).to(tl.int64) * head_stride + place % DIM
        if WRITE:
            tl.store(piece + place, tl.load(there, mask=mask), mask=mask)
        else:
            tl.store(there, tl.load(piece + place, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["tokens", "count"])
def _move(
    keys: tl.tensor,
    key_row: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    values: tl.tensor,
    value_row: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    buffer: tl.tensor,
    offsets: tl.tensor,
    pieces: tl.tensor,
    places: tl.tensor,
    tokens: tl.tensor,
    count: tl.tensor,
    WRITE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """One token of one row. Keys and values are whole numbers, whose bits are moved."""
    number = tl.program_id(0).to(tl.int64)
    row, token = number // tokens, number % tokens
    piece, at = tl.load(pieces + number), tl.load(places + number)
    key_at, value_at = tl.load(offsets + piece), tl.load(offsets + count + piece)
    key, value = keys + row * key_row + token * key_token, values + row * value_row + token * value_token
    keys_in, values_in = buffer + key_at // ALIGN * ALIGN, buffer + value_at // ALIGN * ALIGN  # which the compiler sees
    _move_one(key, keys_in, at, key_head, key_at >= 0, WRITE, HEADS, KEY_DIM, AT_ONCE)
    _move_one(value, values_in, at, value_head, value_at >= 0, WRITE, HEADS, VALUE_DIM, AT_ONCE)


def scatter(keys: Tensor, values: Tensor, buffer: Tensor, offsets: Tensor, pieces: Tensor, at: Tensor) -> None:
    """Writes ``keys`` [B, n, heads, key_dim] and ``values``, as ``reference.scatter`` does. No byte may be the place of
    two tokens. Pieces start at multiples of 16 bytes, or of the dtype's size where the bytes of a token's keys, or
    values, are no multiple of 16."""
    keys, values = (part if part.stride(3) == 1 else part.contiguous() for part in (keys, values))
    _launch(keys, values, buffer, offsets, pieces, at, write=True)


def gather(buffer: Tensor, offsets: Tensor, pieces: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> None:
    """Reads ``keys`` and ``values``, whose last dimensions are neighbours, as ``reference.gather`` does."""
    _launch(keys, values, buffer, offsets, pieces, at, write=False)


def _launch(
    keys: Tensor, values: Tensor, buffer: Tensor, offsets: Tensor, pieces: Tensor, at: Tensor, *, write: bool
) -> None:
    rows, tokens, heads, key_dim = keys.shape
    for part in (keys, values):
        if part.shape[:3] != keys.shape[:3] or part.dtype != keys.dtype or part.stride(3) != 1:
            raise ValueError(f"{list(part.shape)} of {part.dtype}, {list(part.stride())} apart: keys and values alike")
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError(f"a buffer {list(buffer.shape)} of {buffer.dtype}: bytes in one dimension are needed")
    if offsets.dtype != torch.int64 or offsets.dim() != 2 or len(offsets) != 2 or not offsets.is_contiguous():
        raise ValueError(f"offsets {list(offsets.shape)} of {offsets.dtype}: contiguous int64 [2, pieces] are needed")
    for each in (pieces, at):
        if each.dtype != torch.int64 or each.shape != (rows, tokens) or not each.is_contiguous():
            raise ValueError(f"{list(each.shape)} of {each.dtype}: contiguous int64 [{rows}, {tokens}] are needed")
    if keys.numel() == 0:
        return
    widths = [heads * part.shape[3] * part.dtype.itemsize for part in (keys, values)]
    align = _ALIGN if all(width % _ALIGN == 0 for width in widths) else keys.dtype.itemsize
    parts = [part.view(_BITS[part.dtype.itemsize]) for part in (keys, values)]
    strided = [each for part in parts for each in (part, *part.stride()[:3])]
    with cast(Any, torch.cuda).device_of(keys):
        _move[(rows * tokens,)](
            *(*strided, buffer, offsets, pieces, at, tokens, offsets.shape[1]),
            *(write, heads, key_dim, values.shape[3], align, _AT_ONCE),
            **FUSED,
        )
