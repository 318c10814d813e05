"""Attention of one query a row over pages that are not packed, on a CPU: compiled by llvmlite."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tierstore.kernels.machine_code import MachineCode
from tierstore.kernels.paged_attention.partial import Partial

LANES = 8
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

PREFERRED = False
"""To the model's own attention over pages that were gathered, which gives its very numbers."""

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


def fits(key_dim: int, value_dim: int) -> bool:
    """Whether heads of this size are whole vectors."""
    return key_dim % LANES == value_dim % LANES == 0


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
) -> Sums:
    """``triton.decode_raw`` for ``q`` [S, Hq, 1, Dk] on a CPU where ``can_compile`` and heads ``fits`` say so; for
    ``combine``, with others.

    Products and sums are float32. Numbers depend on the pages and their order, not on how many threads compute: as many
    as torch may use. Raises ``ValueError``.
    """
    rows, asked, _, key_dim = q.shape
    group = asked // max(heads, 1)
    _check(q, buffer, (key_offsets, value_offsets), spans, dtype, heads, value_dim)
    pieces = key_offsets.shape[1]
    if q.numel() == 0 or not pieces:
        return Sums(*(torch.empty(0, rows, asked, *more) for more in ((value_dim,), (), ())))
    piece_nbytes = piece_tokens * (key_dim + value_dim) * dtype.itemsize
    split_pieces = min(max(TASK_NBYTES // piece_nbytes, 1), pieces)
    splits = -(-pieces // split_pieces)
    threads = 1 + pieces * rows * heads * piece_nbytes // THREAD_NBYTES
    threads = min(threads, splits * rows * heads, torch.get_num_threads())
    queries = (q.float() * (scale if softcap is None else scale / softcap)).contiguous()
    out, most, total = torch.empty(splits * rows * asked, value_dim), *torch.empty(2, splits, rows, asked).unbind()
    scores = torch.empty(threads * group * ((piece_tokens + 15) // LANES * LANES))
    code = _code(DTYPES[dtype], heads, group, key_dim, value_dim, softcap is not None)
    code.carry_out(
        threads,
        *(part.data_ptr() for part in (queries, buffer, key_offsets, value_offsets, spans, out, most, total, scores)),
        *(_bits(softcap or 0.0), rows, pieces, splits, split_pieces, piece_tokens),
    )
    return Sums(out.view(splits, rows, asked, value_dim), most, total)


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


@lru_cache(maxsize=32)
def _code(element: str, heads: int, group: int, key_dim: int, value_dim: int, capped: bool) -> MachineCode:
    from tierstore.kernels.paged_attention.vector import Shape, write

    return MachineCode(write(Shape(element, heads, group, key_dim, value_dim, capped)))


def _bits(value: float) -> int:
    """Those of a float32."""
    return int.from_bytes(struct.pack("<f", value), "little")


def _check(
    q: Tensor, buffer: Tensor, at: tuple[Tensor, Tensor], spans: Tensor, dtype: torch.dtype, heads: int, value_dim: int
) -> None:
    rows, asked, length, key_dim = q.shape
    if length > 1:
        raise ValueError(f"{length} queries a row: one is needed")
    if not heads or asked % heads:
        raise ValueError(f"{asked} heads of queries for {heads} of keys: a multiple is needed")
    if not fits(key_dim, value_dim):
        raise ValueError(f"heads of {key_dim} keys and {value_dim} values: multiples of {LANES} are needed")
    if dtype not in DTYPES:
        raise ValueError(f"pages of {dtype}: one of {', '.join(map(str, DTYPES))} is needed")
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
