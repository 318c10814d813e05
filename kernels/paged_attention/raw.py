"""Tokens of pages that are not packed: written to their places, and read from them, in one launch for all rows."""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.launch import FUSED

_AT_ONCE = 1024
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["pieces"])
def _move(
    states: tl.tensor,
    row_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    buffer: tl.tensor,
    offsets: tl.tensor,
    starts: tl.tensor,
    pieces: tl.tensor,
    WRITE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One token of one row. ``states`` are whole numbers, whose bits are moved."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(starts + row) + token
    count = tl.where((position >= 0) & (position < pieces * TOKENS), HEADS * DIM, 0)
    piece = tl.minimum(tl.maximum(position, 0) // TOKENS, pieces - 1)
    at = tl.load(offsets + row * pieces + piece)
    page = (buffer + at).to(tl.pointer_type(states.dtype.element_ty), bitcast=True)
    page += position % TOKENS * (HEADS * DIM)
    for first in tl.static_range(0, HEADS * DIM, BLOCK):
        place = first + tl.arange(0, BLOCK)
        mask = place < count
        here = states + row * row_stride + token * token_stride + place // DIM * head_stride + place % DIM
        if WRITE:
            tl.store(page + place, tl.load(here, mask=mask), mask=mask)
        else:
            tl.store(here, tl.load(page + place, mask=mask), mask=mask)


def scatter(states: Tensor, buffer: Tensor, offsets: Tensor, starts: Tensor, piece_tokens: int) -> None:
    """Writes ``states`` [S, L, heads, dim], as ``reference.scatter`` does. No byte may be the place of two tokens."""
    if states.stride(3) != 1:
        states = states.contiguous()
    _launch(states, buffer, offsets, starts, piece_tokens, write=True)


def gather(buffer: Tensor, offsets: Tensor, starts: Tensor, into: Tensor, piece_tokens: int) -> None:
    """Reads ``into`` [S, L, heads, dim], whose last dimension is neighbours, as ``reference.gather`` does."""
    _launch(into, buffer, offsets, starts, piece_tokens, write=False)


def _launch(states: Tensor, buffer: Tensor, offsets: Tensor, starts: Tensor, piece_tokens: int, *, write: bool) -> None:
    rows, tokens, heads, dim = states.shape
    if states.stride(3) != 1 or states.dtype.itemsize not in _BITS:
        raise ValueError(f"states {list(states.stride())} apart of {states.dtype}: neighbours in the last dimension")
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError(f"a buffer {list(buffer.shape)} of {buffer.dtype}: bytes in one dimension are needed")
    if offsets.dtype != torch.int64 or offsets.dim() != 2 or len(offsets) != rows or not offsets.is_contiguous():
        raise ValueError(f"offsets {list(offsets.shape)} of {offsets.dtype}: contiguous int64 [{rows}, n] are needed")
    if starts.dtype != torch.int32 or starts.shape != (rows,) or not starts.is_contiguous():
        raise ValueError(f"starts {list(starts.shape)} of {starts.dtype}: contiguous int32 [{rows}] are needed")
    if states.numel() == 0 or offsets.numel() == 0:
        return
    bits = states.view(_BITS[states.dtype.itemsize])
    with cast(Any, torch.cuda).device_of(states):
        _move[(tokens, rows)](
            *(bits, *bits.stride()[:3], buffer, offsets, starts, offsets.shape[1]),
            *(write, piece_tokens, heads, dim, min(_AT_ONCE, triton.next_power_of_2(heads * dim))),
            **FUSED,
        )
