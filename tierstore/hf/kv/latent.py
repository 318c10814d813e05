"""Attention that keeps what keys and values are made from: these are made of a few pages at a time, not of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tierstore.hf.kv.room import States
from tierstore.hf.kv.states import PagedStates
from tierstore.kvformats.format import KvShape

_NAME = "expand_kv"
_SIZES = ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class Expansion:
    """``make`` gives keys [S, heads, n, key_dim] and values [S, heads, n, value_dim] of what pages keep of n tokens."""

    heads: int
    key_dim: int
    value_dim: int
    make: Callable[[Tensor, Tensor], States]

    def nbytes(self, tokens: int, itemsize: int) -> int:
        """Of ``tokens`` tokens, while keys and values are made: their projection and, put together, keys and values as
        wide as these."""
        return tokens * self.heads * (3 * self.key_dim + self.value_dim) * itemsize

    def page_nbytes(self, shape: KvShape, itemsize: int) -> int:
        """Of a page: what it keeps, and what that becomes."""
        kept = shape.page_tokens * shape.heads * (shape.key_dim + shape.value_dim) * itemsize
        return kept + self.nbytes(shape.page_tokens, itemsize)


def expanding_attentions(module: nn.Module) -> list[nn.Module]:
    """The attention modules within ``module`` that make keys and values of what they keep by ``expand_kv``."""
    return [
        each
        for each in module.modules()
        if callable(getattr(each, _NAME, None)) and all(isinstance(getattr(each, size, None), int) for size in _SIZES)
    ]


def expansion_of(attention: Any) -> Expansion:
    """How one of ``expanding_attentions`` makes keys and values."""
    heads, plain, rotated, value_dim = (getattr(attention, size) for size in _SIZES)
    return Expansion(heads, plain + rotated, value_dim, getattr(attention, _NAME))


@contextmanager
def expanding(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Within, what these ``expanding_attentions`` make of handles to pages are handles, which attention expands."""
    before = [vars(each).get(_NAME) for each in attentions]
    try:
        for each in attentions:
            vars(each)[_NAME] = partial(_handles, expansion_of(each))
        yield
    finally:
        for each, own in zip(attentions, before, strict=True):
            if own is None:
                vars(each).pop(_NAME, None)
            else:
                vars(each)[_NAME] = own


def _handles(expansion: Expansion, latents: Tensor, rotated: Tensor) -> States:
    if not (isinstance(latents, PagedStates) and isinstance(rotated, PagedStates)):
        return expansion.make(latents, rotated)
    if latents.states is not rotated.states or (latents.part, rotated.part) != (0, 1):
        return expansion.make(latents, rotated)
    rows, _, length, _ = latents.shape
    states = latents.states.expanded(expansion)
    keys, values = (
        PagedStates.of(states, part, (rows, expansion.heads, length, dim), latents.dtype, latents.device)
        for part, dim in enumerate((expansion.key_dim, expansion.value_dim))
    )
    return keys, values
