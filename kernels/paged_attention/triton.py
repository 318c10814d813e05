"""Attention of a few queries over the pages of each sequence, read where they lie and as they are packed.

The pages of a sequence are divided among programs, each of which gives a part with its log-sum-exp; a second kernel
merges them (Flash-Decoding, Dao et al. 2023). All query heads that read one head of the keys are in one program, so
that each page is read once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierstore.kernels.kv_pages.layout import CODE_BITS, CellLayout, layout_of
from tierstore.kernels.launch import FUSED, NARROW
from tierstore.kernels.paged_attention.attend import attend, merge_splits
from tierstore.kernels.paged_attention.partial import Partial, combine

__all__ = ["combine", "decode", "decode_raw", "fits"]

_ENOUGH = 1024
"""Programs that keep a card busy: a few for each multiprocessor."""
_LEAST_TOKENS, _MOST_SPLITS = 256, 64
"""Of a split, and for a sequence: with fewer tokens, or more splits, to merge the splits would take as long."""
_ALIGN = 16
_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


PREFERRED = True
"""To the model's own attention over pages that were gathered."""

BESIDE = False
"""The stream of the thread that calls these is what computes."""


def fits(key_dim: int, value_dim: int) -> bool:
    """Whether heads can be of this size: of any."""
    return True


def decode(
    q: Tensor,
    buffer: Tensor,
    offsets: Tensor,
    spans: Tensor,
    *,
    kv_format: str,
    heads: int,
    value_dim: int,
    page_tokens: int,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Attention of ``q`` [S, Hq, Lq, Dk] over packed pages: cells of ``kv_format`` in ``buffer``, uint8.

    The pages of row ``r``, one after another, start at byte ``offsets[r]``, int64 [S, n], each a multiple of 16. All
    its queries look at tokens [spans[r, 0], spans[r, 1]), int32 [S, 2], counted from the first token of its first page:
    offsets of pages without such a token are not read. ``heads`` are those of the keys, and divide Hq. Keys and values
    are rounded to the dtype of ``q`` as by ``unpack``; a format that keeps rotated ones is given rotated queries.
    Allocates the part, and one more for each split; launches on the current stream. Raises ``ValueError``.
    """
    if kv_format not in CODE_BITS:
        raise ValueError(f"no packed page is of format {kv_format!r}: there are {', '.join(CODE_BITS)}")
    layout = layout_of(kv_format, heads, page_tokens, q.shape[3], value_dim)
    codes = {"BITS": CODE_BITS[kv_format], "FLOAT": kv_format.startswith("fp"), "ELEMENT": None, "ALIGN": _ALIGN}
    at = (offsets, offsets)
    return _decode(q, buffer, at, spans, layout, codes, heads, value_dim, page_tokens, scale, softcap)


def decode_raw(
    q: Tensor,
    buffer: Tensor,
    key_offsets: Tensor,
    value_offsets: Tensor,
    spans: Tensor,
    *,
    dtype: torch.dtype,
    heads: int,
    value_dim: int,
    piece_tokens: int,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """``decode`` over pieces of pages that are not packed, in ``dtype``.

    The keys of row ``r`` are pieces [piece_tokens, heads, Dk] at byte ``key_offsets[r]``, its values pieces
    [piece_tokens, heads, value_dim] at byte ``value_offsets[r]``, int64 [S, n] both. They are multiples of 16, or of
    the dtype's size where the bytes of a token's keys, or values, are no multiple of 16.
    """
    widths = (heads * q.shape[3] * dtype.itemsize, heads * value_dim * dtype.itemsize)
    align = _ALIGN if all(width % _ALIGN == 0 for width in widths) else dtype.itemsize
    codes = {"BITS": 0, "FLOAT": True, "ELEMENT": _ELEMENTS[dtype], "ALIGN": align}
    at, layout = (key_offsets, value_offsets), CellLayout(0, 0, 0, 0, 0)
    return _decode(q, buffer, at, spans, layout, codes, heads, value_dim, piece_tokens, scale, softcap)


def _decode(
    q: Tensor,
    buffer: Tensor,
    at: tuple[Tensor, Tensor],
    spans: Tensor,
    layout: CellLayout,
    codes: dict[str, Any],
    heads: int,
    value_dim: int,
    tokens: int,
    scale: float,
    softcap: float | None,
) -> Partial:
    _check(q, buffer, at, spans, heads)
    rows, asked, length, key_dim = q.shape
    queries, pages = asked // heads * length, at[0].shape[1]
    blocks = _blocks(queries, tokens, key_dim, value_dim, exact=q.dtype not in NARROW)
    programs = rows * heads * triton.cdiv(queries, blocks["BLOCK_M"])
    splits = _splits(programs, pages * tokens)
    out = q.new_empty((splits, rows, asked, length, value_dim), dtype=torch.float32)
    lse = q.new_empty(out.shape[:-1], dtype=torch.float32)
    whole = Partial(out[0], lse[0])
    if out.numel() == 0:
        return Partial(whole.out, whole.lse.fill_(-torch.inf))
    folded = q.reshape(rows, heads, queries, key_dim).contiguous()
    parts = (
        *(layout.key_codes, layout.value_codes, layout.key_scales, layout.value_scales),
        *(layout.key_first, layout.value_first),
    )
    sizes = {"TOKENS": tokens, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "CAPPED": softcap is not None}
    with cast(Any, torch.cuda).device_of(q):
        attend[(programs, splits)](
            *(folded, buffer, *at, spans, parts, out, lse, pages, heads, queries, scale, softcap or 0.0),
            **codes,
            **sizes,
            **blocks,
            **FUSED,
        )
        if splits > 1:
            whole = Partial(*(torch.empty_like(part) for part in whole))
            wide = blocks["BLOCK_V"]
            merge_splits[(whole.lse.numel(),)](
                out, lse, *whole, splits, value_dim, triton.next_power_of_2(splits), wide, **FUSED
            )
    return whole


def _blocks(queries: int, tokens: int, key_dim: int, value_dim: int, *, exact: bool) -> dict[str, int]:
    """What a program has of queries and takes of tokens at once: so much that nothing is spilled from registers, and
    that 96 KiB of shared memory will do. ``exact`` products are those of float32."""
    block_k, block_v = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    most = (2048 if exact else 4096 if queries > 16 else 8192) // max(block_k, block_v)
    block_t = max(16, min(triton.next_power_of_2(tokens), most))
    widest = 64 if max(block_k, block_v) <= 128 else 32
    block_m = 1 if queries == 1 else max(16, min(triton.next_power_of_2(queries), widest))
    sizes = {"BLOCK_T": block_t, "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_V": block_v}
    return sizes | {"num_stages": 1 if exact else 2}


def _splits(programs: int, tokens: int) -> int:
    """By sizes alone, so that the same sizes give the same bits."""
    return max(1, min(_ENOUGH // max(programs, 1), tokens // _LEAST_TOKENS, _MOST_SPLITS))


def _check(q: Tensor, buffer: Tensor, offsets: tuple[Tensor, Tensor], spans: Tensor, heads: int) -> None:
    rows = q.shape[0]
    if q.dtype not in (*NARROW, torch.float32):
        raise ValueError(f"queries of {q.dtype}: bfloat16, float16 or float32 are needed")
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {heads} heads of keys")
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError(f"a buffer {list(buffer.shape)} of {buffer.dtype}: bytes in one dimension are needed")
    for each in offsets:
        if each.dtype != torch.int64 or each.shape != (rows, offsets[0].shape[1]) or not each.is_contiguous():
            raise ValueError(f"offsets {list(each.shape)} of {each.dtype}: contiguous int64 [{rows}, pages] are needed")
    if spans.dtype != torch.int32 or spans.shape != (rows, 2) or not spans.is_contiguous():
        raise ValueError(f"spans {list(spans.shape)} of {spans.dtype}: contiguous int32 [{rows}, 2] are needed")
