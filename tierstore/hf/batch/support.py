"""Which models can compute tokens of many sequences side by side."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from tierstore.errors import ModuleError
from tierstore.hf.batch.known import KNOWN
from tierstore.hf.kv.memory import KvMemory
from tierstore.hf.kv.shapes import layers_of
from tierstore.hf.splitting import Forward
from tierstore.kernels.paged_attention.tiles import BLOCK_TOKENS

LAYERS = ("full_attention", "sliding_attention")
ROPES = ("default", "linear", "yarn", "llama3", "proportional")
"""Rotations that depend on a token's own position only: not on the longest of the batch."""


def why_not_tokens(module: nn.Module) -> str:
    """Why ``TokenModel`` cannot compute ``module``; empty where it can.

    A model is only taken for one that can when it is known: nothing in it but attention may look at other tokens, and
    nothing but positions may tell where a token is."""
    return next(_reasons(module), "")


def why_not_exact(module: nn.Module) -> str:
    """Why a token's logits may depend, in their last bits, on what else is in its micro-batch, even where products of
    a fixed number of rows do not; empty where there is no such reason."""
    config: Any = module.config
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return "how many tokens an expert gets at once depends on all tokens of a micro-batch" if experts else ""


def check(module: nn.Module, memory: KvMemory) -> None:
    """Raises ``ModuleError`` where ``TokenModel`` cannot compute ``module`` over pages of ``memory``."""
    why = why_not_tokens(module)
    if why:
        raise ModuleError(f"{type(module).__name__} cannot compute tokens of many sequences side by side: {why}")
    for kind in memory.kinds:
        if BLOCK_TOKENS % kind.table.page_tokens:
            raise ModuleError(f"pages of {kind.table.page_tokens} tokens do not fill blocks of {BLOCK_TOKENS} evenly")


def _reasons(module: nn.Module) -> Iterator[str]:
    try:
        layers_of(module)
    except ModuleError as error:
        yield str(error)
        return
    config: Any = module.config
    yield from _of_config(config)
    ropes = set(_ropes(module)).difference(ROPES)
    if ropes:
        yield f"its rotation ({', '.join(sorted(ropes))}) depends on the longest sequence of a batch"
    forward = Forward(inspect.signature(module.forward).parameters, config)
    missing = [name for name in ("input_ids", "position_ids") if name not in forward.parameters]
    missing += [] if forward.cache else ["cache"]
    if missing:
        yield f"its forward takes no {', '.join(missing)}"
    if not getattr(module, "_supports_attention_backend", False):
        yield "it computes attention in a way of its own"
    if config.model_type not in KNOWN:
        yield f"models of type {config.model_type} were not tried"


def _of_config(config: Any) -> Iterator[str]:
    if config.get_text_config(decoder=True) is not config:
        yield "it is more than a decoder of text"
    types = set(getattr(config, "layer_types", None) or ())
    if not types <= set(LAYERS):
        yield f"its layers are of types {', '.join(sorted(types.difference(LAYERS)))}"
    if getattr(config, "attention_chunk_size", None) is not None:
        yield "it attends in chunks"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        yield "its tokens see those behind them"
    if getattr(config, "kv_lora_rank", None) is not None:
        yield "it keeps what keys and values are made from"
    if getattr(config, "num_kv_shared_layers", None):
        yield "some layers read what others keep"


def _ropes(module: nn.Module) -> Iterator[str]:
    """The types of all rotations in the model."""
    for each in module.modules():
        found = getattr(each, "rope_type", None)
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            yield from (name for name in found.values() if isinstance(name, str))
