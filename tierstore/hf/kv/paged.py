"""Attention of a layer's queries over its pages, group by group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from tierstore.activation_plan import CHUNK_TOKENS
from tierstore.hf.kv.decoding import decodable, decode
from tierstore.hf.kv.latent import Expansion
from tierstore.hf.kv.masks import LazyMask
from tierstore.hf.kv.reading import Group
from tierstore.hf.kv.room import Room
from tierstore.hf.kv.state import CacheState
from tierstore.kernels.paged_attention.partial import Partial, combine, merge, partial, shared, working
from tierstore.kvformats.format import KvFormat

_SUMMED = 1 << 16  # so many numbers of parts wait to be added up at once, at most


def attend(
    state: CacheState,
    layer: int,
    query: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    expansion: Expansion | None,
) -> Tensor:
    """[B, Lq, Hq, value_dim]: attention of ``query`` [B, Hq, Lq, key_dim] over all pages of ``layer``.

    ``mask`` is lazy, or dense over the columns that the layer hands out [B or 1, Hq or 1, Lq, L], or None for none.
    With an ``expansion``, pages keep what keys and values are made from, and no more of them are made at once than the
    scratch has room for, but for those of one page.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    cells = state.kind_of(layer).cells
    form, shape = cells.form, cells.shape
    starts = decodable(state, layer, query, mask) if expansion is None else None
    if starts is not None:
        found = decode(state, layer, query, starts, scale, softcap)
        return merge([found], sinks).to(query.dtype).transpose(1, 2).contiguous()
    masks = Masks(state, layer, mask, query.shape[2])
    scratch, value_dim = state.memory.scratch, shape.value_dim
    if expansion is None:
        dtype, tokens = working(query, shape.heads, max(shape.key_dim, value_dim), softcap)
        most = masks.pages if tokens is None else min(masks.pages, max(tokens // shape.page_tokens, 1))
    else:
        dtype, value_dim = query.dtype, expansion.value_dim
        most = min(masks.pages, max(scratch.numel() // expansion.page_nbytes(shape, dtype.itemsize), 1))
    room = Room(shape, dtype, query.device, scratch)
    asking, rotated = query.to(dtype), None
    total = _Total(query, value_dim, min(_SUMMED, state.memory.bound.masked))
    for group in state.reader(layer).groups(layer, room, min(room.most, most)):
        if expansion is not None:
            group = _expanded(group, expansion, form)
        if group.packed and rotated is None:
            rotated = form.rotate_query(asking)
        mine = cast(Tensor, rotated) if group.packed else asking
        compute = shared if group.keys.shape[0] < len(group.rows) else partial
        step = masks.step(group)
        for start in range(0, query.shape[2], step):
            queries = slice(start, min(start + step, query.shape[2]))
            seen = masks.of(group, queries)
            theirs = total.of(mine, group.rows, queries)
            found = compute(theirs, group.keys, group.values, seen, scale=scale, softcap=softcap)
            if group.packed:
                found = Partial(form.unrotate_output(found.out), found.lse)
            total.add(group.rows, queries, found)
    return merge(total.parts(), sinks).to(query.dtype).transpose(1, 2).contiguous()


def _expanded(group: Group, expansion: Expansion, form: KvFormat) -> Group:
    """The keys and values that are made of what ``group`` has."""
    dtype, states = group.keys.dtype, (group.keys, group.values)
    if group.packed:
        states = form.unrotate_output(group.keys).to(dtype), form.unrotate_output(group.values).to(dtype)
    keys, values = expansion.make(*states)
    return replace(group, keys=keys, values=values, packed=False)


class _Total:
    """Adds up parts of ``query`` [B, Hq, Lq, key_dim], each of some rows and queries; ``most`` numbers wait."""

    def __init__(self, query: Tensor, value_dim: int, most: int) -> None:
        self._shape, self._value_dim, self._most = query.shape[:3], value_dim, most
        self._everyone = tuple(range(query.shape[0]))
        self._device = query.device
        self._whole: list[Partial] = []  # parts of all rows and queries

    def of(self, states: Tensor, rows: tuple[int, ...], queries: slice) -> Tensor:
        """``states`` [B, Hq, Lq, dim] of some rows and queries."""
        states = states if rows == self._everyone else states[list(rows)]
        return states if queries.stop - queries.start == states.shape[2] else states[:, :, queries]

    def add(self, rows: tuple[int, ...], queries: slice, found: Partial) -> None:
        if rows == self._everyone and queries.stop - queries.start == self._shape[2]:
            self._whole.append(found)
            if len(self._whole) * found.out.numel() > self._most:
                self._whole = [combine(self._whole)]
            return
        if not self._whole:
            self._whole = [self._nothing()]
        elif len(self._whole) > 1:
            self._whole = [combine(self._whole)]
        total, which = self._whole[0], list(rows)
        after = combine([Partial(*(part[which][:, :, queries] for part in total)), found])
        total.out[which, :, queries] = after.out
        total.lse[which, :, queries] = after.lse

    def parts(self) -> list[Partial]:
        """What is left to be added up."""
        return self._whole or [self._nothing()]

    def _nothing(self) -> Partial:
        out = torch.zeros(*self._shape, self._value_dim, device=self._device)
        return Partial(out, torch.full(self._shape, -math.inf, device=self._device))


class Masks:
    """The part of a mask that concerns a group of pages."""

    def __init__(self, state: CacheState, layer: int, mask: Tensor | None, queries: int) -> None:
        self._passing = state.passing_of(layer)
        self._columns = self._passing.columns
        self._mask, self._queries = mask, queries
        self._rows, self._most = len(state.rows), state.memory.bound.masked
        self._size = state.kind_of(layer).table.page_tokens

    @property
    def pages(self) -> int:
        """How many pages a group may have, so that not just a few queries look at it at once."""
        return max(self._most // (self._rows * self._size * min(self._queries, CHUNK_TOKENS)), 1)

    def step(self, group: Group) -> int:
        """How many queries at once."""
        return max(self._most // (len(group.rows) * group.keys.shape[2]), 1)

    def of(self, group: Group, queries: slice) -> Tensor | None:
        """Which keys of ``group`` the ``queries`` see, for ``partial``; None for all of them."""
        columns = self._columns
        if self._sees_all(group):
            return None
        name = (id(self._mask), group.rows, group.indices, queries.start, queries.stop)
        known = self._passing.masks.get(name)
        if known is not None:
            return known[1]
        rows = torch.tensor(group.rows, device=columns.device)
        index = torch.tensor(group.indices, device=columns.device)
        tokens = torch.arange(self._size, device=columns.device)
        positions = (index[:, :, None] * self._size + tokens).flatten(1)
        lengths = torch.tensor([columns.lengths[r] for r in group.rows], device=columns.device)
        valid = positions < lengths[:, None]
        of_position = columns.column_of
        there = of_position[rows] if of_position.shape[0] > 1 else of_position.expand(len(rows), -1)
        positions = positions.expand(len(rows), -1).clamp(max=of_position.shape[1] - 1)
        where = there.gather(1, positions).clamp(max=columns.stop - 1)
        seen: Tensor
        if isinstance(self._mask, LazyMask):
            seen = self._mask.block(rows, queries, where, padded=not columns.trusted) & valid[:, None, None, :]
        elif self._mask is None:
            seen = valid[:, None, None, :]
        else:
            seen = self._sliced(self._mask, rows, queries, where, valid)
        kept = sum(each.numel() for _, each in self._passing.masks.values())
        if kept + seen.numel() <= self._most // 4 and isinstance(self._mask, LazyMask):
            self._passing.masks[name] = (self._mask, seen)  # which lives as long, so that no other one has its id
        return seen

    def _sees_all(self, group: Group) -> bool:
        """Whether all keys are old, and within the window of the last query: then nothing hides any."""
        window = math.inf if self._mask is None else self._mask.window if isinstance(self._mask, LazyMask) else None
        if window is None or not self._columns.trusted:
            return False
        pages = [group.indices[0]] * len(group.rows) if len(group.indices) < len(group.rows) else group.indices
        first = 0 if window == math.inf else self._columns.stop - int(window)
        return all(
            (max(indices) + 1) * self._size <= self._columns.before[r]
            and (first <= 0 or min(indices) * self._size >= self._columns.positions_before(r, first))
            for r, indices in zip(group.rows, pages, strict=True)
        )

    def _sliced(self, mask: Tensor, rows: Tensor, queries: slice, where: Tensor, valid: Tensor) -> Tensor:
        """Of a dense mask over the columns from the first on: bool, or what is added to scores."""
        where = where - self._passing.first
        valid = valid & (where >= 0)
        mine = mask[:, :, queries] if mask.shape[0] == 1 else mask[rows][:, :, queries]
        mine = mine.expand(len(rows), -1, -1, -1)
        index = where.clamp(min=0)[:, None, None, :].expand(-1, mine.shape[1], mine.shape[2], -1)
        seen = mine.gather(3, index)
        if seen.dtype == torch.bool:
            return seen & valid[:, None, None, :]
        return seen.masked_fill(~valid[:, None, None, :], -math.inf)
