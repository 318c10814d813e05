"""Attention over pages, registered with transformers' ``AttentionInterface``.

Where all keys and values of a layer fit the scratch, they are gathered and handed to the attention that the model
came with, so that its numbers are those of the plain model, bit by bit where pages keep all bits. Otherwise pages are
attended to group by group while the next ones are on their way, and the parts are merged (online softmax). Where pages
keep what keys and values are made from, these are made of what was gathered, or of each group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tierstore.errors import ModuleError
from tierstore.hf.kv.decoding import preferred
from tierstore.hf.kv.latent import Expansion
from tierstore.hf.kv.masks import LazyMask, lazily
from tierstore.hf.kv.paged import attend
from tierstore.hf.kv.room import States
from tierstore.hf.kv.state import CacheState
from tierstore.hf.kv.states import PagedStates

ORIGINALS = ("sdpa", "eager")
PREFIX = "tierstore_"
_ALIGN = 64


def register(original: str) -> str:
    """Register attention over pages with transformers, for models that use ``original``; the name it has there."""
    name = PREFIX + original
    AttentionInterface.register(name, paged_attention(original))
    AttentionMaskInterface.register(name, lazily(original))
    return name


def paged_attention(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Attention for models that use the function ``original``, which still computes whatever is not in pages."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if dropout:
            raise ModuleError("attention over pages has no dropout: call module.eval() first")
        call = _original(module, original)
        if not (isinstance(key, PagedStates) and isinstance(value, PagedStates) and key.states is value.states):
            return call(module, query, key, value, _whole(attention_mask), scaling=scaling, dropout=0.0, **kwargs)
        state, layer, expansion = cast(CacheState, key.states.source), key.states.layer, key.states.expansion
        in_place = expansion is None and preferred(state, layer, query, attention_mask)
        into = None if in_place else _room(state, layer, query, attention_mask, original, kwargs, expansion)
        if into is None:
            softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
            with _in_own_dtype(query, state.memory.dtype) as asking:
                out = attend(state, layer, asking, attention_mask, scaling, softcap, sinks, expansion)
            weights = None
        else:
            state.reader(layer).gather(layer, into)
            into = into if expansion is None else expansion.make(*into)
            out, weights = call(module, query, *into, _whole(attention_mask), scaling=scaling, dropout=0.0, **kwargs)
        state.close(layer)
        return out, weights

    return forward


@contextmanager
def _in_own_dtype(query: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Within, parts of attention are computed and merged in the precision that they ask for, whatever autocast says;
    gives the query for that."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        yield query
        return
    with torch.autocast(kind, enabled=False):
        yield query.to(dtype)


def _original(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the file of the model uses under this name."""
    there = vars(sys.modules[type(module).__module__])
    interface = there.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    if name != "eager":
        return cast(Callable[..., Any], interface[name])
    eager = there.get("eager_attention_forward")
    if eager is None:
        raise ModuleError(
            f"{type(module).__name__} has no eager_attention_forward to fall back on: load without kv_hbm"
        )
    return cast(Callable[..., Any], interface.get("eager", eager))


def _whole(mask: Tensor | None) -> Tensor | None:
    return mask.whole() if isinstance(mask, LazyMask) else mask


def _room(
    state: CacheState,
    layer: int,
    query: Tensor,
    mask: Tensor | None,
    original: str,
    options: dict[str, Any],
    expansion: Expansion | None,
) -> States | None:
    """Where to gather keys and values to: memory of the scratch, or None where they do not fit.

    What only the original attention knows how to do takes memory of its own if it has to."""
    shape, memory = state.kind_of(layer).cells.shape, state.memory
    rows, heads, length = len(state.rows), shape.heads, state.length_of(layer)
    sizes = [rows * heads * length * dim for dim in (shape.key_dim, shape.value_dim)]
    starts = [0, -(-sizes[0] // _ALIGN) * _ALIGN]
    element = memory.dtype.itemsize
    gathered, beside = (starts[1] + sizes[1]) * element, 0
    group = query.shape[1] // heads
    queries = query.shape[2]
    scores = original == "eager"
    if expansion is not None:
        beside += expansion.nbytes(rows * length, element)
        scores = scores or expansion.key_dim != expansion.value_dim  # which fused attention may not take
    elif group > 1 and (original == "eager" or queries > 1):
        beside += (sizes[0] + sizes[1]) * element * group  # where the original repeats them
    masked = rows * queries * length
    if scores or (mask is not None and queries > 1):
        beside += masked * (query.shape[1] * 8 if scores else 1)
    # what a mask becomes before it is added to scores counts where activations are bounded
    if gathered + beside <= memory.scratch.numel() and beside + masked * element <= memory.bound.nbytes:
        flat = memory.scratch[: memory.scratch.numel() // element * element].view(memory.dtype)
        parts = [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    elif _only_original(query, mask, options):
        parts = [torch.empty(size, dtype=memory.dtype, device=memory.device) for size in sizes]
    else:
        return None
    keys, values = parts
    return keys.view(rows, heads, length, shape.key_dim), values.view(rows, heads, length, shape.value_dim)


def _only_original(query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """A bias by position, or queries that see what only the original's defaults say."""
    return options.get("position_bias") is not None or (mask is None and query.shape[2] > 1)
