"""What a token needs of a transformers decoder's layers, read from its config."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tierstore.activation_plan import CHUNK_TOKENS, LayerShape
from tierstore.errors import ModuleError
from tierstore.hf.kv.latent import expanding_attentions, expansion_of
from tierstore.kernels.paged_attention.partial import SCORES

if TYPE_CHECKING:
    from tierstore.hf.kv.memory import KvMemory

MASKLESS = ("flash", "flex")
"""Attention of these kinds writes down neither scores nor masks as wide as all keys."""


_KNOWN = 64  # bytes of what is known of each position over pages: its token, column, page and place in that


def layer_shape(module: nn.Module, *, chunked_mlp: bool, memory: KvMemory | None) -> LayerShape:
    """The shape of ``module``'s widest layer, with attention over pages of ``memory``, or None for tensors.

    Raises ``ModuleError`` for what has no config of a decoder."""
    whole: Any = getattr(module, "config", None)
    config = whole.get_text_config(decoder=True) if hasattr(whole, "get_text_config") else whole
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(hidden, int):
        raise ModuleError(
            f"{type(module).__name__} has no config that says how wide its hidden states are, and activations are "
            "bounded for transformers' decoders only: leave Budget.activations out"
        )
    heads = _first(config, "num_attention_heads") or 1
    width = _first(config, "qk_head_dim", "head_dim") or hidden // heads
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    shape = LayerShape(
        hidden=hidden,
        inner=_inner(config, hidden),
        queries=heads * width,
        keys=2 * (_first(config, "num_key_value_heads") or heads) * width,
        vocabulary=_first(config, "vocab_size") or 0,
        dtype_nbytes=dtype.itemsize,
        chunked_mlp=chunked_mlp,
    )
    if memory is not None:
        group = max(2 * shape.queries // shape.keys, 1)
        page_tokens = max(kind.table.page_tokens for kind in memory.kinds)
        fixed = 2 * 4 * SCORES if getattr(config, "attn_logit_softcapping", None) else 0
        expansions = [expansion_of(each) for each in expanding_attentions(module)]
        if expansions:  # as much as the scratch has, or what one page becomes
            pages = [each.page_nbytes(memory.kinds[0].cells.shape, dtype.itemsize) for each in expansions]
            fixed += max(memory.scratch.numel(), *pages)
        return replace(
            shape,
            fixed_nbytes=fixed,
            context_nbytes=_KNOWN,
            # as bool, kept and while it is made, and as what is added to scores, once more for queries that share keys;
            # and as many numbers of parts wait to be added up
            masked_nbytes=3 + 4 + (1 + group) * dtype.itemsize,
            masked_least=CHUNK_TOKENS * page_tokens,  # with fewer queries, what is known of each key would count too
        )
    attention = str(getattr(config, "_attn_implementation", None))
    maskless = any(kind in attention for kind in MASKLESS)
    masks = len(set(getattr(config, "layer_types", None) or ["one"]))
    # as bool, while they are put together, and as what is added to scores; and these, scaled, masked and as shares
    mask = masks + 2 + dtype.itemsize
    scores = 0 if attention == "sdpa" else heads * (3 * dtype.itemsize + 4)
    # a cache of tensors that grows is copied; and where there is a mask, keys and values are repeated for every query
    copied = shape.keys if maskless else max(2 * shape.queries, shape.keys)
    return replace(shape, key_nbytes=0 if maskless else mask + scores, context_nbytes=copied * dtype.itemsize)


def _inner(config: Any, hidden: int) -> int:
    plain = _first(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * hidden
    chosen = _first(config, "num_experts_per_tok", "moe_topk", "moe_k") or 0
    expert = _first(config, "moe_intermediate_size") or plain
    # each token stands once for every expert that it goes to
    return max(plain, chosen * (expert + hidden) + (plain if chosen else 0))


def _first(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
