"""The kernels of attention over pages: a part for each split of a sequence's pages, and the merge of the splits."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from tierstore.kernels.paged_attention.cells import load_states, tokens_of


@triton.jit
def _load_columns(
    start: tl.tensor, places: tl.tensor, count: tl.tensor, DIM: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Rows ``places`` of a matrix [count, DIM] as columns: [BLOCK_D, places], 0 where it has none."""
    dims = tl.arange(0, BLOCK_D)
    mask = (places < count)[None, :] & (dims < DIM)[:, None]
    return tl.load(start + places[None, :] * DIM + dims[:, None], mask=mask, other=0)


@triton.jit
def _store_part(
    out: tl.tensor,
    lse: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    DIM: tl.constexpr,
) -> None:
    """``places`` of ``out`` [count, DIM] and ``lse`` [count], from ``sums`` [dims, places] of values whose weights, the
    exponentials of what their scores are above ``top``, are ``total`` together."""
    some, dims = total != 0, tl.arange(0, sums.shape[0])
    divisor = tl.where(some, total, 1)
    tl.store(lse + places, tl.where(some, top + tl.log(divisor), float("-inf")), mask=places < count)
    mask = (places < count)[None, :] & (dims < DIM)[:, None]
    tl.store(out + places[None, :] * DIM + dims[:, None], sums / divisor[None, :], mask=mask)


@triton.jit
def attend(
    q: tl.tensor,
    buffer: tl.tensor,
    key_offsets: tl.tensor,
    value_offsets: tl.tensor,
    spans: tl.tensor,
    layout: tl.tuple,
    out: tl.tensor,
    lse: tl.tensor,
    pages: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    ELEMENT: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """A row, a head of the keys and BLOCK_M of its queries, and a split. Tokens are rows of its tiles: scores are
    [tokens, queries], sums of the values [VALUE_DIM, queries]. One query is multiplied in float32, without ``tl.dot``.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    row, head = pair // heads, pair % heads
    places = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    start, stop = tl.load(spans + 2 * row), tl.load(spans + 2 * row + 1)
    fold: tl.constexpr = 8 // BITS if BITS else 1
    rows: tl.constexpr = TOKENS // fold
    step: tl.constexpr = BLOCK_T // fold
    tiles: tl.constexpr = (rows + step - 1) // step
    first = tl.maximum(start, 0) // TOKENS * tiles
    last = tl.minimum(tl.cdiv(stop, TOKENS), pages) * tiles
    each = tl.cdiv(tl.maximum(last - first, 0), tl.num_programs(1))
    first += tl.program_id(1) * each

    key_codes, value_codes, key_scales, value_scales, key_first, value_first = layout
    asked = _load_columns(q + pair * queries * KEY_DIM, places, queries, KEY_DIM, BLOCK_K)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_V, BLOCK_M), tl.float32)
    for tile in range(first, tl.minimum(first + each, last)):
        page, start_row = tile // tiles, tile % tiles * step
        key_at = tl.load(key_offsets + row * pages + page) // ALIGN * ALIGN  # a product: the compiler forgets hints
        value_at = tl.load(value_offsets + row * pages + page) // ALIGN * ALIGN
        tokens = tokens_of(start_row, rows, BLOCK_T, fold)
        seen = (tokens < TOKENS) & (page * TOKENS + tokens >= start) & (page * TOKENS + tokens < stop)
        element: tl.constexpr = q.dtype.element_ty
        keys = load_states(
            *(buffer + key_at, key_codes, key_scales, key_first, head, heads, start_row, tokens, True),
            *(BITS, FLOAT, ELEMENT, TOKENS, KEY_DIM, BLOCK_K),
        ).to(element)
        if BLOCK_M == 1:
            scores = tl.sum(keys.to(tl.float32) * asked.to(tl.float32).trans(), axis=1)[:, None]
        else:
            scores = tl.dot(keys, asked, input_precision="ieee")
        scores *= scale
        if CAPPED:
            scores = softcap * (1 - 2 / (tl.exp(scores * (2 / softcap)) + 1))
        scores = tl.where(seen[:, None], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=0))
        base = tl.where(highest == float("-inf"), 0, highest)
        weights, fade = tl.exp(scores - base[None, :]), tl.exp(top - base)
        total = total * fade + tl.sum(weights, axis=0)
        values = load_states(
            *(buffer + value_at, value_codes, value_scales, value_first, head, heads, start_row, tokens, False),
            *(BITS, FLOAT, ELEMENT, TOKENS, VALUE_DIM, BLOCK_V),
        )
        values = tl.where(seen[:, None], values, 0).to(element)  # what a page holds past its tokens may be anything
        if BLOCK_M == 1:
            sums = sums * fade[None, :] + tl.sum(values.to(tl.float32) * weights, axis=0)[:, None]
        else:
            sums = tl.dot(values.trans(), weights.to(element), sums * fade[None, :], input_precision="ieee")
        top = highest

    first_query = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) + pair) * queries
    _store_part(out + first_query * VALUE_DIM, lse + first_query, places, queries, top, total, sums, VALUE_DIM)


@triton.jit
def merge_splits(
    outs: tl.tensor,
    lses: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    splits: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One query of ``outs`` [splits, n, DIM] and ``lses`` [splits, n]."""
    query, count = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    places, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    where = places.to(tl.int64) * count + query
    parts = tl.load(lses + where, mask=places < splits, other=float("-inf"))
    top = tl.max(parts, axis=0)
    base = tl.where(top == float("-inf"), 0, top)
    shares = tl.exp(parts - base)
    total = tl.sum(shares, axis=0)
    mask = (places < splits)[:, None] & (dims < DIM)[None, :]
    values = tl.load(outs + where[:, None] * DIM + dims[None, :], mask=mask, other=0)
    sums = tl.sum(values * shares[:, None], axis=0)
    divisor = tl.where(total != 0, total, 1)
    tl.store(out + query * DIM + dims, sums / divisor, mask=dims < DIM)
    tl.store(lse + query, tl.where(total != 0, base + tl.log(divisor), float("-inf")))
