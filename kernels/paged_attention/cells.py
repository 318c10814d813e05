"""How a tile of a page is read in each format: the keys, or the values, of one head, as float32.

For each format two jitted functions, of the keys and of the values, that ``CELLS`` lists beside where the parts of a
cell are. Both take ``(cell, layout, head, heads, first, ELEMENT, TOKENS, DIM, BLOCK_T, BLOCK_D)``: the address of the
cell, the offsets of its parts, the tile's first token, and the dtype of a model's states. They return float32
[BLOCK_T, BLOCK_D], which is finite past TOKENS and DIM if what is stored is. See ``kernels/kv_pages/reference.py`` for
what stands in a cell.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import triton
import triton.language as tl

from tierstore.kernels.kv_pages.layout import CellLayout, layout_of


@triton.jit
def load_tile(
    start: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_T, BLOCK_D] from row ``first`` on of a matrix [TOKENS, DIM] whose rows are ``stride`` apart, else 0."""
    tokens, dims = first + tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return tl.load(start + tokens * stride + dims, mask=(tokens < TOKENS) & (dims < DIM), other=0)


@triton.jit
def load_scales(start: tl.tensor, first: tl.tensor, COUNT: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """float32 [BLOCK] from ``first`` on of bfloat16 [COUNT]."""
    places = first + tl.arange(0, BLOCK)
    scales = start.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    return tl.load(scales + places, mask=places < COUNT, other=0).to(tl.float32)


@triton.jit
def raw_states(
    cell: tl.tensor,
    layout: tl.tuple,
    head: tl.tensor,
    heads: tl.tensor,
    first: tl.tensor,
    ELEMENT: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Of a piece [TOKENS, heads, DIM] of keys, or of values."""
    start = cell.to(tl.pointer_type(ELEMENT), bitcast=True) + head * DIM
    return load_tile(start, heads * DIM, first, TOKENS, DIM, BLOCK_T, BLOCK_D).to(tl.float32)


@triton.jit
def int8_keys(
    cell: tl.tensor,
    layout: tl.tuple,
    head: tl.tensor,
    heads: tl.tensor,
    first: tl.tensor,
    ELEMENT: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """A scale for each token."""
    key_codes, _, key_scales, _ = layout
    start = (cell + key_codes + head * (TOKENS * DIM)).to(tl.pointer_type(tl.int8), bitcast=True)
    codes = load_tile(start, DIM, first, TOKENS, DIM, BLOCK_T, BLOCK_D).to(tl.float32)
    return codes * load_scales(cell + key_scales + head * (2 * TOKENS), first, TOKENS, BLOCK_T)[:, None]


@triton.jit
def int8_values(
    cell: tl.tensor,
    layout: tl.tuple,
    head: tl.tensor,
    heads: tl.tensor,
    first: tl.tensor,
    ELEMENT: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """A scale for each token."""
    _, value_codes, _, value_scales = layout
    start = (cell + value_codes + head * (TOKENS * DIM)).to(tl.pointer_type(tl.int8), bitcast=True)
    codes = load_tile(start, DIM, first, TOKENS, DIM, BLOCK_T, BLOCK_D).to(tl.float32)
    return codes * load_scales(cell + value_scales + head * (2 * TOKENS), first, TOKENS, BLOCK_T)[:, None]


class Cell(NamedTuple):
    """A format: where the parts of a cell are, for so many heads, tokens, dims of keys and of values; and how its keys
    and values are read."""

    layout: Callable[[int, int, int, int], CellLayout]
    keys: Any
    values: Any


RAW = Cell(lambda *_: CellLayout(0, 0, 0, 0, 0), raw_states, raw_states)
"""Keys and values each in a place of their own, as the model made them."""
CELLS = {"int8": Cell(partial(layout_of, "int8"), int8_keys, int8_values)}
