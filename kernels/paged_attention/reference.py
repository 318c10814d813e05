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


def gather(buffer: Tensor, offsets: Tensor, pieces: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> None:
    """Reads what ``scatter`` wrote. What is in no piece stays as it is."""
    for states, row, token, there in _places(buffer, offsets, pieces, at, keys, values):
        states[row, token] = there.clone().view(states.dtype).view(states.shape[2:])


def scatter(keys: Tensor, values: Tensor, buffer: Tensor, offsets: Tensor, pieces: Tensor, at: Tensor) -> None:
    """Writes each token of ``keys`` [B, n, heads, key_dim] and ``values`` [B, n, heads, value_dim] to its place in
    ``buffer``, uint8: token ``at`` of piece ``pieces``, both int64 [B, n].

    Piece ``p`` of the keys is [piece_tokens, heads, key_dim] from byte ``offsets[0, p]`` on, that of the values from
    byte ``offsets[1, p]`` on, int64 [2, pieces]; those at -1 are left out.
    """
    for states, row, token, there in _places(buffer, offsets, pieces, at, keys, values):
        there.copy_(states[row, token].contiguous().view(-1).view(torch.uint8))


def _places(
    buffer: Tensor, offsets: Tensor, pieces: Tensor, at: Tensor, keys: Tensor, values: Tensor
) -> Iterator[tuple[Tensor, int, int, Tensor]]:
    for states, starts in zip((keys, values), offsets.tolist(), strict=True):
        nbytes = states.shape[2] * states.shape[3] * states.dtype.itemsize
        for row, numbers in enumerate(pieces.tolist()):
            for token, piece in enumerate(numbers):
                if starts[piece] >= 0:
                    start = starts[piece] + int(at[row, token]) * nbytes
                    yield states, row, token, buffer[start : start + nbytes]
