"""Attention of tokens of many sequences, registered with transformers' ``AttentionInterface``."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tierstore.errors import ModuleError
from tierstore.hf.batch.passes import MicroPass
from tierstore.hf.kv.masks import LazyMask, lazily
from tierstore.hf.kv.states import PagedStates

NAME = "tierstore_tokens"


def register() -> str:
    """Register this attention with transformers; the name it has there."""
    AttentionInterface.register(NAME, attend_tokens)
    AttentionMaskInterface.register(NAME, lazily("sdpa"))
    return NAME


def attend_tokens(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, R, Hq, value_dim]: each of ``query`` [1, Hq, R, key_dim] sees its own sequence up to its position.

    ``key`` and ``value`` are handles of a ``TokenCache``. The mask is not looked at, but it must be one that says just
    this of a single sequence. Raises ``ModuleError`` for what this attention is not."""
    if not (isinstance(key, PagedStates) and isinstance(value, PagedStates) and key.states is value.states):
        raise ModuleError(f"{type(module).__name__} attends to keys that are not in the cache: {_INSTEAD}")
    micro, layer = cast(MicroPass, key.states.source), key.states.layer
    if dropout:
        raise ModuleError("attention over pages has no dropout: call module.eval() first")
    if kwargs.get("position_bias") is not None:
        raise ModuleError(f"{type(module).__name__} adds a bias to scores: {_INSTEAD}")
    window = micro.kind_of(layer).window
    if not isinstance(attention_mask, LazyMask) or attention_mask.window != (math.inf if window is None else window):
        seen = "all tokens before it" if window is None else f"{window} tokens"
        raise ModuleError(f"layer {layer} has a mask of its own, other than that a token sees {seen}: {_INSTEAD}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return micro.attend(layer, query, scale, kwargs.get("softcap"), kwargs.get("s_aux")), None


_INSTEAD = "generate one sequence at a time"
