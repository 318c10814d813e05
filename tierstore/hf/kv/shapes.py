"""What the layers of a transformers decoder keep of each token, read from its config and its attention modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tierstore.errors import ModuleError

WITHOUT = "load it without kv_hbm, and transformers' own cache is used"
_DUMMY = "DummyLayer"  # of layers that keep nothing; older transformers have none


@dataclass(frozen=True, slots=True)
class LayerKv:
    """Keys [heads, key_dim] and values [heads, value_dim] of a token in layer ``layer``, of which a query sees
    ``window`` tokens; None is all."""

    layer: int
    heads: int
    key_dim: int
    value_dim: int
    window: int | None


def layers_of(module: nn.Module) -> tuple[LayerKv, ...]:
    """What each layer that keeps keys and values keeps. Raises ``ModuleError`` for models whose cache is another."""
    name = type(module).__name__
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ModuleError(f"{name} has no config of a transformers decoder, so its KV cache is unknown: {WITHOUT}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModuleError(f"{name} is an encoder-decoder, whose two caches cannot be paged: {WITHOUT}")
    text = config.get_text_config(decoder=True)
    if not hasattr(module, "generate") or not getattr(module, "_supports_default_dynamic_cache", lambda: True)():
        raise ModuleError(f"{name} does not generate with transformers' default cache: {WITHOUT}")
    configs = getattr(text, "per_layer_config", None)
    found = []
    attentions = _attentions(module)
    for layer, kept in enumerate(DynamicCache(config=text).layers):
        if type(kept).__name__ == _DUMMY:
            continue
        if type(kept) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModuleError(f"layer {layer} of {name} keeps a {type(kept).__name__}, not keys and values: {WITHOUT}")
        window = getattr(kept, "sliding_window", None)
        shape = _shape(configs[layer] if configs is not None else text, attentions.get(layer))
        found.append(LayerKv(layer, *shape, window))
    if not found:
        raise ModuleError(f"{name} has no layer that keeps keys and values: {WITHOUT}")
    return tuple(found)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the keys and values that ``module`` computes: that of its config, else of its weights."""
    dtype = getattr(module, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def alike(layers: Sequence[LayerKv]) -> tuple[tuple[LayerKv, ...], ...]:
    """``layers`` by kind: those with the same shape and window together, in the order in which kinds appear."""
    kinds: dict[tuple[Any, ...], list[LayerKv]] = {}
    for each in layers:
        kinds.setdefault((each.heads, each.key_dim, each.value_dim, each.window), []).append(each)
    return tuple(tuple(kind) for kind in kinds.values())


def _attentions(module: nn.Module) -> dict[int, nn.Module]:
    """The module of each layer that projects to keys, by the number that it knows itself by."""
    found: dict[int, nn.Module] = {}
    for each in module.modules():
        number = getattr(each, "layer_idx", None)
        if not isinstance(number, int) or getattr(each, "is_cross_attention", False) is True:
            continue
        if number not in found or hasattr(each, "k_proj"):
            found[number] = each
    return found


def _shape(config: Any, attention: nn.Module | None) -> tuple[int, int, int]:
    """Heads, width of a key, width of a value."""
    latent = _first((config,), "kv_lora_rank")
    if latent is not None:  # what keys and values are made from is kept, and the part of a key that has a position
        return 1, latent, _first((config,), "qk_rope_head_dim") or 1
    queries = _first((config,), "num_attention_heads", "n_head", "num_heads") or 1
    hidden = _first((config,), "hidden_size", "n_embd", "d_model") or queries
    width = _first((attention, config), "head_dim") or hidden // queries
    key = _first((attention, config), "qk_head_dim") or width
    value = _first((attention, config), "v_head_dim") or width
    heads = _first((attention, config), "num_key_value_heads", "num_kv_heads", "kv_heads") or queries
    alone = _outputs(attention, "k_proj")
    fused = _outputs(attention, "query_key_value", "qkv_proj")
    if alone and alone % key == 0:
        heads = alone // key
    elif fused and key == value and (fused // key - queries) % 2 == 0:
        heads = (fused // key - queries) // 2
    return heads, key, value


def _outputs(attention: nn.Module | None, *names: str) -> int | None:
    return _first([getattr(attention, name, None) for name in names], "out_features")


def _first(owners: Sequence[Any], *names: str) -> int | None:
    values: Iterator[Any] = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
