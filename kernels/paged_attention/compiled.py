"""Attention of one query a row over pages where they lie, packed or not, on a CPU: compiled by llvmlite."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tierstore.kernels.kv_pages.layout import CODE_BITS, layout_of
from tierstore.kernels.machine_code import MachineCode
from tierstore.kernels.paged_attention.partial import Partial

LANES = 8
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

PREFERRED = False
"""To the model's own attention over pages that were gathered, which gives its very numbers."""

BESIDE = True
"""Other threads may call these while the caller goes on: what they return is computed."""

TASK_NBYTES = 1 << 19
"""Of keys and values in a task: with fewer, sums would cost as much to merge."""

THREAD_NBYTES = 4 << 20
"""Of keys and values for each thread. One reads as many faster than a disk brings them, and leaves other cores to who
reads the disk; to wait for each other costs threads the more."""


class Sums(NamedTuple):
    """Over some keys, in splits: ``out`` float32 [splits, S, Hq, Dv], of values, each times the exponential of its
    score less ``most``; ``total`` the sum of these exponentials; both float32 [splits, S, Hq]."""

    out: Tensor
    most: Tensor
    total: Tensor


class _Code(NamedTuple):
    """``thread_floats`` of memory that each thread works with; bytes that a page has of one head."""

    machine: MachineCode
    thread_floats: int
    head_nbytes: int


def fits(key_dim: int, value_dim: int) -> bool:
    """Whether heads of this size are whole vectors."""
    return key_dim % LANES == value_dim % LANES == 0


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
    threads: int | None = None,
) -> Sums:
    """``triton.decode`` for ``q`` [S, Hq, 1, Dk] on a CPU where ``can_compile`` and heads ``fits`` say so; for
    ``combine``, with others.

    Keys and values are not rounded; products and sums are float32. Numbers depend on the pages and their order, not on
    how many ``threads`` compute: as many as torch may use, where none are given. Raises ``ValueError``.
    """
    if kv_format not in CODE_BITS:
        raise ValueError(f"no packed page is of format {kv_format!r}: there are {', '.join(CODE_BITS)}")
    if page_tokens % LANES:
        raise ValueError(f"pages of {page_tokens} tokens: a multiple of {LANES} is needed")
    _check(q, buffer, (offsets, offsets), spans, heads, value_dim)
    code = _packed_code(kv_format, heads, q.shape[1] // heads, q.shape[3], value_dim, page_tokens, softcap is not None)
    return _carry_out(code, q, buffer, (offsets, offsets), spans, heads, value_dim, scale, softcap, threads)


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
    threads: int | None = None,
) -> Sums:
    """``decode`` over pieces of pages that are not packed, as ``triton.decode_raw`` says."""
    if dtype not in DTYPES:
        raise ValueError(f"pages of {dtype}: one of {', '.join(map(str, DTYPES))} is needed")
    at = (key_offsets, value_offsets)
    _check(q, buffer, at, spans, heads, value_dim)
    code = _raw_code(dtype, heads, q.shape[1] // heads, q.shape[3], value_dim, piece_tokens, softcap is not None)
    return _carry_out(code, q, buffer, at, spans, heads, value_dim, scale, softcap, threads)


def combine(parts: Sequence[Sums]) -> Partial:
    """Sums over different keys of the same queries as one part; the order does not matter but for rounding."""
    out, most, total = (torch.cat(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True))
    if not len(out):
        return Partial(out.new_zeros(*out.shape[1:3], 1, out.shape[3]), most.new_full((*most.shape[1:], 1), -torch.inf))
    highest = most.amax(0)
    shares = (most - highest).exp_()
    total = total.mul_(shares).sum(0)
    found = out.mul_(shares.unsqueeze(-1)).sum(0)
    found /= torch.where(total == 0, 1, total).unsqueeze(-1)  # of what sees no key
    return Partial(found.unsqueeze(2), (highest + total.log()).unsqueeze(2))


def _carry_out(
    code: _Code,
    q: Tensor,
    buffer: Tensor,
    at: tuple[Tensor, Tensor],
    spans: Tensor,
    heads: int,
    value_dim: int,
    scale: float,
    softcap: float | None,
    threads: int | None,
) -> Sums:
    rows, asked, pages = q.shape[0], q.shape[1], at[0].shape[1]
    if q.numel() == 0 or not pages:
        return Sums(*(torch.empty(0, rows, asked, *more) for more in ((value_dim,), (), ())))
    split_pages = min(max(TASK_NBYTES // code.head_nbytes, 1), pages)
    splits = -(-pages // split_pages)
    useful = 1 + pages * rows * heads * code.head_nbytes // THREAD_NBYTES
    threads = min(useful, splits * rows * heads, threads or torch.get_num_threads())
    queries = (q.float() * (scale if softcap is None else scale / softcap)).contiguous()
    out, most, total = torch.empty(splits * rows * asked, value_dim), *torch.empty(2, splits, rows, asked).unbind()
    scratch = torch.empty(threads * code.thread_floats)
    code.machine.carry_out(
        threads,
        *(part.data_ptr() for part in (queries, buffer, *at, spans, out, most, total, scratch)),
        *(_bits(softcap or 0.0), rows, pages, splits, split_pages),
    )
    return Sums(out.view(splits, rows, asked, value_dim), most, total)


@lru_cache(maxsize=32)
def _packed_code(
    kv_format: str, heads: int, group: int, key_dim: int, value_dim: int, page_tokens: int, capped: bool
) -> _Code:
    from tierstore.kernels.paged_attention.vector_packed import PackedAttention

    made = PackedAttention(kv_format, heads, group, key_dim, value_dim, page_tokens=page_tokens, capped=capped)
    nbytes = layout_of(kv_format, heads, page_tokens, key_dim, value_dim).nbytes
    return _Code(MachineCode(made.write()), made.thread_floats, nbytes // heads)


@lru_cache(maxsize=32)
def _raw_code(
    dtype: torch.dtype, heads: int, group: int, key_dim: int, value_dim: int, piece_tokens: int, capped: bool
) -> _Code:
    from tierstore.kernels.paged_attention.vector_raw import RawAttention

    element = DTYPES[dtype]
    made = RawAttention(element, heads, group, key_dim, value_dim, page_tokens=piece_tokens, capped=capped)
    nbytes = piece_tokens * (key_dim + value_dim) * dtype.itemsize
    return _Code(MachineCode(made.write()), made.thread_floats, nbytes)


def _bits(value: float) -> int:
    """Those of a float32."""
    return int.from_bytes(struct.pack("<f", value), "little")


def _check(q: Tensor, buffer: Tensor, at: tuple[Tensor, Tensor], spans: Tensor, heads: int, value_dim: int) -> None:
    rows, asked, length, key_dim = q.shape
    if length > 1:
        raise ValueError(f"{length} queries a row: one is needed")
    if not heads or asked % heads:
        raise ValueError(f"{asked} heads of queries for {heads} of keys: a multiple is needed")
    if not fits(key_dim, value_dim):
        raise ValueError(f"heads of {key_dim} keys and {value_dim} values: multiples of {LANES} are needed")
    if any(part.device.type != "cpu" for part in (q, buffer, *at, spans)):
        raise ValueError("the query, the pages and their places: all in host memory are needed")
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(f"a buffer {list(buffer.shape)} of {buffer.dtype}: bytes in one dimension are needed")
    shape = (rows, at[0].shape[-1])
    for part in at:
        if part.dtype != torch.int64 or part.shape != shape or not part.is_contiguous():
            raise ValueError(
                f"offsets {list(part.shape)} of {part.dtype}: contiguous int64 {list(shape)} are needed, of keys as of "
                "values"
            )
    if spans.dtype != torch.int32 or spans.shape != (rows, 2) or not spans.is_contiguous():
        raise ValueError(f"spans {list(spans.shape)} of {spans.dtype}: contiguous int32 [{rows}, 2] are needed")
