"""Attention of tiles of queries whose results do not depend on each other to the last bit, in plain torch.

Softmax runs over blocks of keys in ascending order (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). All
is float32. Products are batched, of operands that are copied so that each item has one fixed shape and one alignment:
then a library has no reason to add in another order for one item than for many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

BLOCK_TOKENS = 256
"""Keys that are added at a time."""
_ALIGNED = 16
"""Floats in 64 bytes: the address modulo these decides how products on a CPU are computed."""
_FLOATS_ON_CPU, _FLOATS_ON_DEVICE = 1 << 19, 1 << 22
"""So many numbers of keys, and of values, are made float32 at once: on a CPU what a cache keeps until it is read."""
_LEAST_EXPONENT = -80.0
"""A share is at least the exponential of this, beside the highest one. Smaller ones are slow on CPUs, and nothing."""
_LEAST_ITEMS = 2
"""One item alone is, to some libraries, not a batch but a product of another kind."""


class TileAttention:
    """Attention of ``n`` tiles of ``T`` queries each over blocks of keys that are added one after another.

    A query's result depends on itself, its position and the keys and values it sees: not on the other queries and
    tiles, on how many there are, on their order, or on the number of threads. ``T`` and the heads do count.
    """

    def __init__(
        self,
        q: Tensor,
        positions: Tensor,
        *,
        kv_heads: int,
        value_dim: int,
        scale: float,
        softcap: float | None = None,
        window: int | None = None,
    ) -> None:
        """``q`` [n, T, Hq, Dk] of any floating dtype, ``positions`` int64 [n, T], -1 for padding; best on the CPU.

        Hq is a multiple of ``kv_heads``: query head ``h`` reads key head ``h * kv_heads // Hq``. A query at position
        ``p`` sees keys at positions up to ``p``, and with a ``window`` only that many of them, itself included. Scores
        are ``softcap * tanh(q @ k * scale / softcap)``, or without a softcap just scaled. Raises ``ValueError`` for
        shapes that do not belong together.
        """
        if q.dim() != 4 or positions.shape != q.shape[:2]:
            raise ValueError(f"q {list(q.shape)}, positions {list(positions.shape)}: need [n, T, Hq, Dk] and [n, T]")
        if kv_heads < 1 or q.shape[2] % kv_heads:
            raise ValueError(f"q has {q.shape[2]} heads: need a multiple of the {kv_heads} heads of the keys")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}: a query sees at least itself")
        self._n, self._queries, heads, self._key_dim = q.shape
        self._heads, self._group = kv_heads, heads // kv_heads
        self._value_dim, self._softcap, self._window = value_dim, softcap, window
        self._q = self._items_of(q, positions, scale if softcap is None else scale / softcap)
        self._positions = positions.to(q.device)
        self._lowest = positions.where(positions >= 0, torch.iinfo(positions.dtype).max).amin(1).tolist()
        self._highest = positions.amax(1).tolist()
        self._added = [-1] * self._n
        state = (self._n, kv_heads, self._queries, self._group)
        self._top = self._q.new_full(state, torch.finfo(torch.float32).min)
        self._total = self._q.new_zeros(state)
        self._sum = self._q.new_zeros((*state, _aligned(value_dim)))
        widest = kv_heads * BLOCK_TOKENS * max(self._q.shape[-1], self._sum.shape[-1])
        on_cpu = q.device.type == "cpu"
        self._most = max((_FLOATS_ON_CPU if on_cpu else _FLOATS_ON_DEVICE) // widest, 1)
        self._most_shared, self._least = self._most, self._most
        # On a CPU the number of items changes no bit, elsewhere the shape of a whole batch may choose the algorithm.
        if on_cpu:
            self._most_shared = max(_FLOATS_ON_CPU // (kv_heads * self._queries * self._group * BLOCK_TOKENS), 1)
            self._least = -(-_LEAST_ITEMS // kv_heads)
        self._scratch = self._q.new_empty(max(self._most, self._least) * widest)

    def add(self, tiles: Sequence[int], index: int, keys: Tensor, values: Tensor) -> None:
        """Lets ``tiles`` look at block ``index``: keys at positions from ``index * BLOCK_TOKENS`` on.

        ``keys`` [m, BLOCK_TOKENS, Hkv, Dk] and ``values`` [m, BLOCK_TOKENS, Hkv, Dv] of the m different ``tiles``, of
        any floating dtypes and strides; one block expanded to m is read once. Each tile gets its blocks in ascending
        order; those that none of its queries sees may be left out. What a query does not see may be anything, infinite
        or not a number too. A query that sees a value that is not finite gets one that is not a number. Raises
        ``ValueError`` for what does not belong together.
        """
        self._check(tiles, index, keys, values)
        first = index * BLOCK_TOKENS
        places = [place for place, tile in enumerate(tiles) if self._span(tile, first)]
        shared = keys.stride(0) == values.stride(0) == 0
        most = self._most_shared if shared else self._most
        for start in range(0, len(places), most):
            some = places[start : start + most]
            there = slice(0, 1) if shared else _indexes(some, keys.device)
            self._add([tiles[place] for place in some], first, keys[there], values[there])

    def result(self, sinks: Tensor | None = None) -> Tensor:
        """float32 [n, T, Hq, Dv] over what was added until now; 0 for padding, and where no key was seen.

        ``sinks`` [Hq] are scores that take a share of each query's attention and give no value (attention sinks).
        """
        total = self._total.clamp(min=1)  # what was seen has a score that is the highest, whose exponential is 1
        if sinks is not None:
            total += (sinks.to(total).view(self._heads, 1, self._group) - self._top).exp()
        found = (self._sum[..., : self._value_dim] / total.unsqueeze(-1)).permute(0, 2, 1, 3, 4)
        found = found.reshape(self._n, self._queries, self._heads * self._group, self._value_dim)
        return found.add_(0.0).masked_fill_((self._positions < 0)[..., None, None], 0)  # -0.0 + 0.0 is 0.0

    def _items_of(self, q: Tensor, positions: Tensor, scale: float) -> Tensor:
        """Float32 [n, Hkv, T, group, Dk], contiguous, scaled, with zeros for padding and up to whole 64 bytes."""
        parted = q.view(self._n, self._queries, self._heads, self._group, self._key_dim).permute(0, 2, 1, 3, 4)
        items = q.new_zeros((*parted.shape[:-1], _aligned(self._key_dim)), dtype=torch.float32)
        torch.mul(parted.float(), scale, out=items[..., : self._key_dim])
        return items.masked_fill_((positions < 0).to(q.device)[:, None, :, None, None], 0)

    def _check(self, tiles: Sequence[int], index: int, keys: Tensor, values: Tensor) -> None:
        need = (len(tiles), BLOCK_TOKENS, self._heads)
        if keys.shape != (*need, self._key_dim) or values.shape != (*need, self._value_dim):
            raise ValueError(
                f"keys {list(keys.shape)}, values {list(values.shape)}: need {[*need, self._key_dim]} and "
                f"{[*need, self._value_dim]}"
            )
        if len(set(tiles)) != len(tiles):
            raise ValueError(f"tiles {list(tiles)}: each may occur once")
        for tile in tiles:
            if not 0 <= tile < self._n or index <= self._added[tile]:
                raise ValueError(
                    f"block {index} for tile {tile} of {self._n}: need a block behind the last one that it got"
                )
        for tile in tiles:
            self._added[tile] = index

    def _span(self, tile: int, first: int) -> range:
        """Which of the keys from position ``first`` on any query of ``tile`` may see."""
        start = 0 if self._window is None else self._lowest[tile] - self._window + 1 - first
        return range(max(start, 0), min(self._highest[tile] + 1 - first, BLOCK_TOKENS))

    def _sees_all(self, tile: int, first: int) -> bool:
        below = self._window is not None and first <= self._highest[tile] - self._window
        return not below and self._lowest[tile] >= first + BLOCK_TOKENS - 1

    def _add(self, tiles: list[int], first: int, keys: Tensor, values: Tensor) -> None:
        """Lets ``tiles``, of which each has a query that sees one, look at the keys from position ``first`` on: all at
        the same, or each at its own."""
        there = len(tiles)
        padded = tiles + tiles[:1] * (self._least - there)
        at = _indexes(padded, self._q.device)
        scores = self._product(self._q[at].flatten(2, 3), self._copied(keys, len(padded)).transpose(-1, -2))
        scores = scores.view(len(padded), self._heads, self._queries, self._group, BLOCK_TOKENS)
        if self._softcap is not None:
            scores.tanh_().mul_(self._softcap)
        unseen = None if all(self._sees_all(tile, first) for tile in tiles) else self._unseen(at, first)
        if unseen is not None:
            scores = torch.where(unseen, -math.inf, scores)
        before = self._top[at]
        top = torch.maximum(before, scores.amax(-1))
        shares = scores.sub_(top.unsqueeze(-1)).clamp_(min=_LEAST_EXPONENT).exp_()
        if unseen is not None:
            shares *= unseen.logical_not().float()
        kept = (before - top).exp_()
        total = (self._total[at] * kept).add_(shares.sum(-1))
        sums = (self._sum[at] * kept.unsqueeze(-1)).add_(self._weighted(shares, values, tiles, first, unseen))
        at = _indexes(tiles, self._q.device)
        for state, new in ((self._top, top), (self._total, total), (self._sum, sums)):
            state[at] = new[:there]

    def _unseen(self, at: slice | Tensor, first: int) -> Tensor:
        """bool [m, 1, T, 1, BLOCK_TOKENS]: which keys a query of the tiles ``at`` must not look at."""
        positions = self._positions[at][:, None, :, None, None]
        keys = torch.arange(first, first + BLOCK_TOKENS, device=positions.device)
        unseen = keys > positions
        return unseen if self._window is None else unseen | (keys <= positions - self._window)

    def _copied(self, states: Tensor, padded: int) -> Tensor:
        """``states`` [m, BLOCK_TOKENS, Hkv, D] as float32 [m, Hkv, BLOCK_TOKENS, D], until the next call. Of more than
        one ``padded`` are there."""
        blocks, dim = states.shape[0], states.shape[-1]
        shape = (padded if blocks > 1 else 1, self._heads, BLOCK_TOKENS, _aligned(dim))
        copied = self._scratch[: math.prod(shape)].view(shape)
        copied[:blocks, ..., :dim].copy_(states.transpose(1, 2))
        if dim < shape[-1]:
            copied[..., dim:] = 0
        return copied

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """[n, Hkv, a, c] of ``left`` [n, Hkv, a, b] and ``right`` [n or 1, Hkv, b, c], float32."""
        if right.shape[0] == left.shape[0] and left.device.type == "cpu":
            return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).view(*left.shape[:-1], -1)
        of_heads = [
            torch.bmm(left[:, head].contiguous(), right[:, head].expand(len(left), -1, -1))
            for head in range(self._heads)
        ]
        return torch.stack(of_heads, 1)

    def _weighted(self, shares: Tensor, values: Tensor, tiles: list[int], first: int, unseen: Tensor | None) -> Tensor:
        """Sums [m, Hkv, T, group, Dv] of ``values`` with ``shares`` [m, Hkv, T, group, BLOCK_TOKENS]."""
        copied, spans = self._copied(values, shares.shape[0]), [self._span(tile, first) for tile in tiles]
        if len(copied) < len(tiles):
            spans = [range(min(span.start for span in spans), max(span.stop for span in spans))]
        for place, span in enumerate(spans):  # a share of 0 does not make garbage harmless: 0 * inf is not a number
            if span.start > 0:
                copied[place, :, : span.start] = 0
            if span.stop < BLOCK_TOKENS:
                copied[place, :, span.stop :] = 0
        flat = shares.flatten(2, 3)
        sums = self._product(flat, copied)
        if not math.isfinite(sums[: len(tiles)].sum().item()):
            # What one query sees, another may not: each gets what is not a number only if it sees what is not finite.
            odd = copied.isfinite().logical_not_()
            seen = torch.ones_like(shares) if unseen is None else unseen.logical_not().float().expand(shares.shape)
            sums = self._product(flat, copied.masked_fill_(odd, 0))
            sums.masked_fill_(self._product(seen.flatten(2, 3), odd.float()) > 0, math.nan)
        return sums.view(*shares.shape[:-1], -1)


def _indexes(places: list[int], device: torch.device) -> slice | Tensor:
    """What picks ``places``, of which there are some: as a slice where they follow each other."""
    if all(after == before + 1 for before, after in pairwise(places)):
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, device=device)


def _aligned(floats: int) -> int:
    return -(-floats // _ALIGNED) * _ALIGNED
