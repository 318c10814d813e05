"""How the keys, or the values, of one head are read from a page in each format, as a tile of float32.

See ``kernels/kv_pages/reference.py`` for what stands in a cell. Codes of less than a byte share it with tokens that are
far from theirs; so a tile has some rows of bytes, and the tokens of all their codes, as ``tokens_of`` lists them.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from tierstore.kernels.small_floats import e2m1, e4m3


@triton.jit
def tokens_of(row: tl.tensor, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, FOLD: tl.constexpr) -> tl.tensor:
    """int32 [BLOCK_T]: which tokens of its page a tile has, whose bytes are rows from ``row`` on of ``ROWS``, each with
    codes of ``FOLD`` tokens. Behind the last row they are too large for any page."""
    places = tl.arange(0, BLOCK_T)
    rows = row + places % (BLOCK_T // FOLD)
    return tl.where(rows < ROWS, places // (BLOCK_T // FOLD) * ROWS + rows, 1 << 30)


@triton.jit
def load_states(
    cell: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    first: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    row: tl.tensor,
    tokens: tl.tensor,
    OF_KEYS: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    ELEMENT: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """float32 [tokens, BLOCK_D] of the ``tokens`` from byte row ``row`` on, of the cell at address ``cell``.

    ``codes``, ``scales`` and ``first`` are where these are in it. ``BITS`` are those of a code, whole or ``FLOAT``; 0
    is for states that are not packed, of dtype ``ELEMENT``. Past the page and ``DIM`` all is finite if the cell is.
    """
    if BITS == 0:
        values = _raw(cell + codes, head, heads, row, ELEMENT, TOKENS, DIM, tokens.shape[0], BLOCK_D)
    elif BITS == 8:
        values = _by_token(cell + codes, cell + scales, head, row, tokens, FLOAT, TOKENS, DIM, BLOCK_D)
    else:
        kept = _load_bfloat16(cell + first, head * DIM, tl.arange(0, BLOCK_D), DIM)[None, :]
        pair = (cell + codes, cell + scales)
        values = _by_range(*pair, head, row, tokens, OF_KEYS, BITS, FLOAT, TOKENS, DIM, BLOCK_D)
        values = tl.where((tokens == 0)[:, None], kept, values)
    return values


@triton.jit
def _raw(
    states: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    row: tl.tensor,
    ELEMENT: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Of a piece [TOKENS, heads, DIM]."""
    start = states.to(tl.pointer_type(ELEMENT), bitcast=True) + head * DIM
    return _load_tile(start, heads * DIM, row, TOKENS, DIM, BLOCK_T, BLOCK_D).to(tl.float32)


@triton.jit
def _by_token(
    codes: tl.tensor,
    scales: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    tokens: tl.tensor,
    FLOAT: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """int8 and fp8."""
    found = _load_tile(codes + head * (TOKENS * DIM), DIM, row, TOKENS, DIM, tokens.shape[0], BLOCK_D)
    values = e4m3(found) if FLOAT else found.to(tl.int8, bitcast=True).to(tl.float32)
    return values * _load_bfloat16(scales, head * TOKENS, tokens, TOKENS)[:, None]


@triton.jit
def _by_range(
    codes: tl.tensor,
    scales: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    tokens: tl.tensor,
    OF_KEYS: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """int4, fp4 and int2: a scale and a zero, of keys by channel, of values by token."""
    rows: tl.constexpr = TOKENS * BITS // 8
    block: tl.constexpr = tokens.shape[0] * BITS // 8
    found = _load_tile(codes + head * (rows * DIM), DIM, row, rows, DIM, block, BLOCK_D).to(tl.int32)
    if BITS == 4:
        spread = tl.join(found, found >> 4).permute(2, 0, 1)
    else:
        pairs = tl.join(found, found >> 2)
        spread = tl.join(pairs, pairs >> 4).permute(3, 2, 0, 1)
    whole = spread.reshape(tokens.shape[0], BLOCK_D)
    values = e2m1(whole << 28) if FLOAT else (whole & (2**BITS - 1)).to(tl.float32)
    if OF_KEYS:
        dims = tl.arange(0, BLOCK_D)
        scale = _load_bfloat16(scales, head * (2 * DIM), dims, DIM)[None, :]
        zero = _load_bfloat16(scales, head * (2 * DIM) + DIM, dims, DIM)[None, :]
    else:
        scale = _load_bfloat16(scales, head * (2 * TOKENS), tokens, TOKENS)[:, None]
        zero = _load_bfloat16(scales, head * (2 * TOKENS) + TOKENS, tokens, TOKENS)[:, None]
    return values * scale + zero


@triton.jit
def _load_tile(
    start: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_R, BLOCK_D] from row ``row`` on of a matrix [ROWS, DIM] whose rows are ``stride`` apart, else 0."""
    rows, dims = row + tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return tl.load(start + rows * stride + dims, mask=(rows < ROWS) & (dims < DIM), other=0)


@triton.jit
def _load_bfloat16(start: tl.tensor, at: tl.tensor, places: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """float32 of the numbers at ``places`` of ``COUNT``, from the one numbered ``at`` on; else 0."""
    numbers = start.to(tl.pointer_type(tl.bfloat16), bitcast=True) + at
    return tl.load(numbers + places, mask=places < COUNT, other=0).to(tl.float32)
