"""What attention over pages computes: the plain statement, in float64, that every other way must agree with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tierstore.kernels.paged_attention.partial import Partial


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, softcap: float | None = None
) -> Partial:
    """``out`` [S, Hq, Lq, Dv] and ``lse`` [S, Hq, Lq], float64, of what ``partial`` takes. Repeats heads."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1) if k.shape[2] else scores.new_full(scores.shape[:3], -math.inf)
    seen = (lse > -math.inf).unsqueeze(-1)
    return Partial(torch.where(seen, (scores - lse.unsqueeze(-1)).exp(), 0) @ v, lse)


def with_sinks(whole: Partial, sinks: Tensor) -> Tensor:
    """The output where each head's one of ``sinks`` [Hq] is one more score, whose value is 0."""
    share = torch.exp(whole.lse) / (torch.exp(whole.lse) + torch.exp(sinks.double())[:, None])
    return whole.out * share.unsqueeze(-1)


def decode(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, stops: Tensor, *, scale: float, softcap: float | None
) -> Partial:
    """``q`` [S, Hq, Lq, Dk] over tokens [starts, stops), int [S] each, of ``keys`` [S, N, Hkv, Dk] and ``values``
    [S, N, Hkv, Dv]: those of a row's pages one after another."""
    tokens = torch.arange(keys.shape[1], device=q.device)
    seen = (tokens >= starts[:, None]) & (tokens < stops[:, None])
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    return attention(q, k, v, seen[:, None, None], scale=scale, softcap=softcap)


def gather(buffer: Tensor, offsets: Tensor, starts: Tensor, into: Tensor, piece_tokens: int) -> None:
    """Reads what ``scatter`` wrote: token ``t`` of row ``r`` of ``into`` becomes position ``starts[r] + t``, and stays
    as it is where there is none."""
    for row, token, there in _places(buffer, offsets, starts, into, piece_tokens):
        into[row, token] = there.clone().view(into.dtype).view(into.shape[2:])


def scatter(states: Tensor, buffer: Tensor, offsets: Tensor, starts: Tensor, piece_tokens: int) -> None:
    """Writes token ``t`` of row ``r`` of ``states`` [S, L, heads, dim] to position ``starts[r] + t``, int32 [S].

    Position ``p`` is token ``p % piece_tokens`` of the piece [piece_tokens, heads, dim] at byte
    ``offsets[r, p // piece_tokens]``, int64 [S, n], of ``buffer``, uint8. Others than these are left out.
    """
    for row, token, there in _places(buffer, offsets, starts, states, piece_tokens):
        there.copy_(states[row, token].contiguous().view(-1).view(torch.uint8))


def _places(
    buffer: Tensor, offsets: Tensor, starts: Tensor, states: Tensor, piece_tokens: int
) -> Iterator[tuple[int, int, Tensor]]:
    nbytes = states.shape[2] * states.shape[3] * states.dtype.itemsize
    for row, (start, pieces) in enumerate(zip(starts.tolist(), offsets.tolist(), strict=True)):
        for token in range(states.shape[1]):
            piece, inside = divmod(start + token, piece_tokens)
            if 0 <= piece < len(pieces):
                yield row, token, buffer[pieces[piece] + inside * nbytes :][:nbytes]
