"""Copies of pages into the order of a batch's columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.hf.kv.passes import KindPass
from tierstore.hf.kv.room import States
from tierstore.hf.kv.runs import even_runs


@dataclass(frozen=True, slots=True)
class Block:
    """Pages ``picks`` of a source hold tokens of ``row`` that are neighbours: from token ``skip`` of the first page on,
    ``count`` of them go to columns from ``column`` on."""

    row: int
    picks: Sequence[int]
    skip: int
    column: int
    count: int

    def copy(self, states: States, into: States) -> None:
        """From pages [n, page_tokens, heads, dim] to columns [B, heads, L, dim], of keys and of values."""
        for source, target in zip(states, into, strict=True):
            _copy(source, self.picks, self.skip, target[self.row, :, self.column : self.column + self.count])


def blocks_of(passing: KindPass, pages: Sequence[int]) -> list[Block] | None:
    """Where the tokens of ``pages`` go; None where rows have holes between their tokens, or pages come in disorder."""
    straight, size = passing.straight, passing.kind.table.page_tokens
    if straight is None:
        return None
    names = passing.closed + passing.unclosed
    number = None if tuple(pages) == names else {page: i for i, page in enumerate(pages)}
    found = []
    for row, (slots, (pad, first, length)) in enumerate(zip(passing.slots, straight, strict=True)):
        picks: Sequence[int] = slots
        index = passing.first_index[row]
        if number is not None:
            there = [i for i, slot in enumerate(slots) if names[slot] in number]
            if not there:
                continue
            if there[-1] - there[0] + 1 != len(there):
                return None
            picks, index = [number[names[slots[i]]] for i in there], index + there[0]
        start, stop = max(index * size, first), min((index + len(picks)) * size, length)
        if stop > start:
            found.append(Block(row, picks, start - index * size, pad + start - first, stop - start))
    return found


def copy_scattered(passing: KindPass, pages: Sequence[int], at: Sequence[int], states: States, into: States) -> None:
    """As ``Block.copy``, token by token and for any rows; page i is entry ``at[i]`` of ``states``. Columns that are not
    stored get what stands in a page of their row."""
    slot, token = passing.slot_of, passing.token_of
    place_of = dict(zip(pages, at, strict=True))
    places = [place_of.get(page, -1) for page in passing.closed + passing.unclosed]
    place = torch.tensor(places, device=slot.device)[slot]
    row, column = (place >= 0).nonzero(as_tuple=True)
    place, tokens = place[row, column], token.expand(slot.shape)[row, column]
    for source, target in zip(states, into, strict=True):
        target[row, :, column] = source[place, tokens].to(target.dtype)


def _copy(pages: Tensor, picks: Sequence[int], skip: int, target: Tensor) -> None:
    """Tokens from ``skip`` on of ``pages[picks]`` [n, page_tokens, heads, dim], to ``target`` [heads, count, dim]."""
    size = pages.shape[1]
    for which, places in even_runs(picks):
        start, stop = which.start * size - skip, which.stop * size - skip
        if start < target.shape[1]:
            _copy_run(pages[places], max(-start, 0), target[:, max(start, 0) : stop])


def _copy_run(pages: Tensor, skip: int, target: Tensor) -> None:
    """As ``_copy``, of all ``pages``. What is whole of them is copied at once."""
    size, count = pages.shape[1], target.shape[1]
    at, page = 0, 0
    if skip:
        at, page = min(size - skip, count), 1
        target[:, :at].copy_(pages[0, skip : skip + at].transpose(0, 1))
    whole = (count - at) // size
    if whole:
        end = at + whole * size
        target[:, at:end].view(-1, whole, size, target.shape[2]).copy_(pages[page : page + whole].permute(2, 0, 1, 3))
        at, page = end, page + whole
    if at < count:
        target[:, at:].copy_(pages[page, : count - at].transpose(0, 1))
