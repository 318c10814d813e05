"""The kernels of attention over pages: a part for each split of a sequence's pages, and the merge of the splits."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


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
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
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
    tiles: tl.constexpr = (TOKENS + BLOCK_T - 1) // BLOCK_T
    first = tl.maximum(start, 0) // TOKENS * tiles
    last = tl.minimum(tl.cdiv(stop, TOKENS), pages) * tiles
    each = tl.cdiv(tl.maximum(last - first, 0), tl.num_programs(1))
    first += tl.program_id(1) * each

    dims = tl.arange(0, BLOCK_K)
    asked = tl.load(
        q + (pair * queries + places[None, :]) * KEY_DIM + dims[:, None],
        mask=(places < queries)[None, :] & (dims < KEY_DIM)[:, None],
        other=0,
    )
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_V, BLOCK_M), tl.float32)
    for tile in range(first, tl.minimum(first + each, last)):
        page, offset = tile // tiles, tile % tiles * BLOCK_T
        key_at = tl.load(key_offsets + row * pages + page) // ALIGN * ALIGN  # a product: the compiler forgets hints
        value_at = tl.load(value_offsets + row * pages + page) // ALIGN * ALIGN
        tokens = offset + tl.arange(0, BLOCK_T)
        seen = (tokens < TOKENS) & (page * TOKENS + tokens >= start) & (page * TOKENS + tokens < stop)
        element: tl.constexpr = q.dtype.element_ty
        keys = KEYS(buffer + key_at, layout, head, heads, offset, element, TOKENS, KEY_DIM, BLOCK_T, BLOCK_K)
        keys = keys.to(element)
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
        values = VALUES(buffer + value_at, layout, head, heads, offset, element, TOKENS, VALUE_DIM, BLOCK_T, BLOCK_V)
        values = tl.where(seen[:, None], values, 0).to(element)  # what a page holds past its tokens may be anything
        if BLOCK_M == 1:
            sums = sums * fade[None, :] + tl.sum(values.to(tl.float32) * weights, axis=0)[:, None]
        else:
            sums = tl.dot(values.trans(), weights.to(element), sums * fade[None, :], input_precision="ieee")
        top = highest

    some = total > 0
    base = tl.where(top == float("-inf"), 0, top)
    where = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) + pair) * queries + places
    tl.store(lse + where, tl.where(some, base + tl.log(tl.where(some, total, 1)), float("-inf")), mask=places < queries)
    dims = tl.arange(0, BLOCK_V)
    tl.store(
        out + where[None, :] * VALUE_DIM + dims[:, None],
        sums / tl.where(some, total, 1)[None, :],
        mask=(places < queries)[None, :] & (dims < VALUE_DIM)[:, None],
    )


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
    divisor = tl.where(total > 0, total, 1)
    tl.store(out + query * DIM + dims, sums / divisor, mask=dims < DIM)
    tl.store(lse + query, tl.where(total > 0, base + tl.log(divisor), float("-inf")))
