"""Attention over a part of the keys with its log-sum-exp, and the merge of parts into the whole, in plain torch.

Softmax over keys in parts is exact: what a part gives is weighted by the share that its exponentials have in the sum
(online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). Query heads that read the same key head are folded into
its queries, so keys and values are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SCORES = 1 << 22
"""So many scores, at most, stand in memory at once where no fused operation does the work: 16 MiB."""
_FLOATS = 1 << 20
"""So many numbers of keys, and of values, are made float32 at once: what stays in a cache until it is read."""
_LEAST = 128
"""Keys at a time, at least, whatever memory they take."""
_FEW = 16
_TASKS, _LEAST_SHARE = 16, 4096
"""Into so many tasks, of so many keys at least, a few queries over many keys are divided, whatever cores there are."""
_PARTS = 8
_MOST_NEGATIVE = torch.finfo(torch.float32).min


class Partial(NamedTuple):
    """Attention over some of the keys: ``out`` float32 [S, Hq, Lq, Dv], as if there were no others, and ``lse`` float32
    [S, Hq, Lq], the logarithm of the sum of the exponentials of their scores. Without any key 0 and -inf."""

    out: Tensor
    lse: Tensor


_Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Partial]


def partial(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, softcap: float | None = None
) -> Partial:
    """Attention of ``q`` [S, Hq, Lq, Dk] over ``k`` [S, Hkv, N, Dk] and ``v`` [S, Hkv, N, Dv], all of one dtype.

    Hq is a multiple of Hkv: query head ``h`` reads key head ``h * Hkv // Hq``. Views with any strides will do, and are
    read where they lie as long as neighbouring elements of a head are neighbours in memory. ``mask`` can be broadcast
    to [S, Hq, Lq, N]: bool, False where a query must not look, or what is added to the scores. What is masked must be
    finite all the same. Scores are ``softcap * tanh(q @ k.T * scale / softcap)``, or without a softcap just scaled.
    Raises ``ValueError`` for shapes or dtypes that do not belong together.
    """
    _check(q, k, v)
    heads, group = k.shape[1], q.shape[1] // max(k.shape[1], 1)
    if mask is not None:
        mask = _added(mask, q, k)
    shape = q.shape[:3]
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return Partial(q.new_zeros((*shape, v.shape[-1]), dtype=torch.float32), _nothing(q))
    folded = q.reshape(q.shape[0], heads, group * q.shape[2], q.shape[3])
    if mask is not None:
        mask = _fold_mask(mask, heads, group, q.shape[2])
    found = _attend(folded, k, v, mask, scale, softcap)
    return Partial(found.out.reshape(*shape, v.shape[-1]), found.lse.reshape(shape))


def shared(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, softcap: float | None = None
) -> Partial:
    """``partial`` of ``q`` [R, Hq, Lq, Dk], whose R rows all look at the same ``k`` [1, Hkv, N, Dk] and ``v``
    [1, Hkv, N, Dv], which are read once: rows become queries. ``mask`` can be broadcast to [R, Hq, Lq, N]."""
    if k.shape[0] != 1:
        raise ValueError(f"k has {k.shape[0]} rows: rows that share keys share one, use partial for others")
    rows, heads, queries, dim = q.shape
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.shape[0] > 1 or mask.shape[2] > 1:
            mask = mask.expand(rows, -1, queries, -1).transpose(0, 1).flatten(1, 2)[None]
    found = partial(q.transpose(0, 1).reshape(1, heads, rows * queries, dim), k, v, mask, scale=scale, softcap=softcap)
    out = found.out.view(heads, rows, queries, v.shape[-1]).transpose(0, 1)
    return Partial(out, found.lse.view(heads, rows, queries).transpose(0, 1))


class Working(NamedTuple):
    """How ``partial`` computes: in ``dtype``, best with ``tokens`` keys at a time; None for as many as there are."""

    dtype: torch.dtype
    tokens: int | None


def working(q: Tensor, heads: int, dim: int, softcap: float | None = None) -> Working:
    """How ``partial`` computes with ``q`` [S, Hq, Lq, Dk] and keys and values of ``heads`` heads, the wider of them
    ``dim``. Who copies these anyway saves a pass by copying so many to this dtype, token-major, and ``q`` too."""
    few = q.shape[1] // heads * q.shape[2] <= _FEW
    on_cpu = q.device.type == "cpu"
    slow = on_cpu and (q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and few))
    dtype = torch.float32 if slow or softcap is not None else q.dtype
    return Working(dtype, max(_FLOATS // (heads * dim), _LEAST) if on_cpu and few else None)


def combine(parts: Sequence[Partial]) -> Partial:
    """Parts over different keys of the same queries as one part, of at least one; the order does not matter but for
    rounding."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([part.lse for part in parts])
    lse = lses.logsumexp(0)
    shares = lses.sub_(lse.clamp(min=_MOST_NEGATIVE)).exp_().unsqueeze(-1)
    out = parts[0].out * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        out.addcmul_(part.out, share)
    return Partial(out, lse)


def merge(parts: Sequence[Partial], sinks: Tensor | None = None) -> Tensor:
    """Attention over the keys of all ``parts``, float32 [S, Hq, Lq, Dv].

    ``sinks`` [Hq] are scores that take a share of each query's attention and give no value (attention sinks). May be
    the memory of a part's ``out``, when it is the only one.
    """
    out, lse = combine(parts)
    if sinks is None:
        return out
    return out * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None]).unsqueeze(-1)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    def fail(need: str) -> None:
        shapes = ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{shapes}: {need}")

    if not q.dim() == k.dim() == v.dim() == 4:
        fail("4 dimensions are needed: rows, heads, tokens, head_dim")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        fail("q and k must have the same rows and head_dim, k and v the same rows, heads and tokens")
    if q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]:
        fail("q must have a multiple of the heads of k")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        fail("one floating dtype is needed")


def _nothing(q: Tensor) -> Tensor:
    return q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)


def _added(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """``mask`` as what is added to scores, with all 4 dimensions, of which the last is that of the keys."""
    whole = (*q.shape[:3], k.shape[2])
    try:
        mask.expand(whole)
    except RuntimeError as error:
        raise ValueError(f"mask {list(mask.shape)} cannot be broadcast to {list(whole)}") from error
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    elif mask.dtype != q.dtype:
        mask = mask.to(torch.promote_types(q.dtype, torch.float32))
    return mask.expand(-1, -1, -1, k.shape[2])


def _fold_mask(mask: Tensor, heads: int, group: int, queries: int) -> Tensor:
    """From [S or 1, Hq or 1, Lq or 1, N] to [S or 1, Hkv or 1, group * Lq or 1, N]."""
    rows, theirs, _, keys = mask.shape
    if mask.shape[1:3] == (1, 1) or group == 1:
        return mask
    if theirs == 1:
        return mask.unsqueeze(2).expand(rows, 1, group, queries, keys).reshape(rows, 1, group * queries, keys)
    return mask.expand(rows, theirs, queries, keys).reshape(rows, heads, group * queries, keys)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Partial:
    """By what is fastest. On a CPU float16, and few queries in bfloat16, are slower than the same made float32."""
    rows, heads, queries, _ = q.shape
    if softcap is not None or q.device.type not in ("cpu", "cuda") or (q.is_cuda and q.dtype == torch.float64):
        step = SCORES // (rows * heads * queries)
        return _in_float32(lambda q, k, v, mask: _plain(q, k, v, mask, scale, softcap), step, q, k, v, mask)
    if q.device.type == "cuda":
        return _fused_on_cuda(q, k, v, mask, scale)
    if rows == 1 and queries <= _FEW and heads < _TASKS and k.shape[2] >= 2 * _LEAST_SHARE:
        return _for_all_cores(q, k, v, mask, scale)
    if q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and queries <= _FEW):
        step = _FLOATS // (rows * heads * max(q.shape[3], v.shape[3]))
        return _in_float32(lambda q, k, v, mask: _fused_on_cpu(q, k, v, mask, scale), step, q, k, v, mask)
    return _fused_on_cpu(q, k, v, mask, scale)


def _for_all_cores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Partial:
    """One row, whose keys are cut into shares that are rows: each row and head is a task that one core does alone."""
    shares = min(k.shape[2] // _LEAST_SHARE, _TASKS // k.shape[1])
    share = k.shape[2] // shares
    stop = shares * share
    keys, values = (t[0, :, :stop].unfold(1, share, share).permute(1, 0, 3, 2) for t in (k, v))
    there = None
    if mask is not None:
        there = mask[0, ..., :stop].unfold(2, share, share).permute(2, 0, 1, 3)
    found = _attend(q.expand(shares, -1, -1, -1), keys, values, there, scale, None)
    parts = [Partial(found.out[i : i + 1], found.lse[i : i + 1]) for i in range(shares)]
    if stop < k.shape[2]:
        rest = slice(stop, None)
        parts.append(_attend(q, k[:, :, rest], v[:, :, rest], None if mask is None else mask[..., rest], scale, None))
    return combine(parts)


def _in_float32(attend: _Attend, step: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Partial:
    """Some ``step`` keys at a time, made float32 in memory that is used again for the next ones."""
    step = min(k.shape[2], max(_LEAST, step))
    q, found = q.float(), list[Partial]()
    room = [None if t.dtype == torch.float32 else _room(t, step) for t in (k, v)]
    for start in range(0, k.shape[2], step):
        there = slice(start, start + step)
        keys, values = (_put(t[:, :, there], wide) for t, wide in zip((k, v), room, strict=True))
        found.append(attend(q, keys, values, None if mask is None else mask[..., there].float()))
        if len(found) == _PARTS:
            found = [combine(found)]
    return combine(found)


def _room(t: Tensor, tokens: int) -> Tensor:
    """For so many tokens, heads and tokens in the order of ``t``: so that copies are of long pieces."""
    rows, heads, _, dim = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty((rows, tokens, heads, dim), dtype=torch.float32).transpose(1, 2)
    return t.new_empty((rows, heads, tokens, dim), dtype=torch.float32)


def _put(t: Tensor, into: Tensor | None) -> Tensor:
    return t if into is None else into[:, :, : t.shape[2]].copy_(t)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Partial:
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.clamp(min=_MOST_NEGATIVE).unsqueeze(-1)).exp_()
    return Partial(weights @ v, lse)


def _fused_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Partial:
    """By torch's flash attention, which reads any strides but that of the last dimension, and wants one head size.

    Its mask is of the dtype of ``q``, or float32 beside a narrower one: it takes others for what they are not. It gives
    0 as the log-sum-exp of a query that sees no key.
    """
    size, width = v.shape[3], max(q.shape[3], v.shape[3])
    q, k, v = (_wide(t, width) for t in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    out, lse = out[..., :size].float(), lse.float()
    if mask is not None and bool((lse == 0).any()):
        lse = lse.masked_fill((mask == -math.inf).all(-1), -math.inf)
    return Partial(out, lse)


def _fused_on_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Partial:
    """By torch's memory-efficient attention, which takes masks whose rows start at multiples of 16 bytes, and head
    sizes that fill as many. What it says of a query that sees no key is not looked at."""
    queries, size, keys = q.shape[2], v.shape[3], k.shape[2]
    q, k, v = (_wide(t, -(-t.shape[3] // 8) * 8) for t in (q, k, v))
    added = None
    if mask is not None:
        added = pad(mask.to(q.dtype), (0, -keys % 8)).contiguous()[..., :keys].expand(*q.shape[:3], keys)
    found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, added, True, scale=scale)
    out, lse = found[0][..., :size].float(), found[1][..., :queries]
    if mask is not None:
        unseen = (mask == -math.inf).all(-1).expand(lse.shape)
        out, lse = out.masked_fill(unseen.unsqueeze(-1), 0), lse.masked_fill(unseen, -math.inf)
    return Partial(out, lse)


def _wide(t: Tensor, width: int) -> Tensor:
    """With zeros up to ``width`` in the last dimension, whose elements are neighbours then."""
    if t.shape[3] < width:
        return pad(t, (0, width - t.shape[3]))
    return t if t.stride(3) == 1 else t.contiguous()
