"""The arguments of a decoder's forward for some of its positions, or why they cannot be split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

CACHES = ("cache", "past_key_values", "cache_params")
"""What forwards call their cache; the name changed between versions of transformers."""
ENTERING = ("input_ids", "inputs_embeds")
PER_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "cache_position")
"""Arguments whose last dimension goes with the tokens."""
FOR_ALL = ("labels", "output_hidden_states", "output_attentions", "output_router_logits", "head_mask")
"""What can only be given, or asked for, for all tokens at once."""
_Given = Mapping[str, Any]


@dataclass(frozen=True)
class Forward:
    """What is to be known of a decoder's forward before it is called."""

    parameters: Mapping[str, Parameter]
    config: Any

    @property
    def cache(self) -> str:
        """The name of its cache; empty where it has none."""
        return next((name for name in CACHES if name in self.parameters), "")

    def read(self, args: tuple[Any, ...], kwargs: _Given) -> dict[str, Any]:
        """The arguments of a call by name; a cache under another name than the forward has for it is found too."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        caches = [given.pop(name) for name in CACHES if name in given]
        if self.cache:
            given[self.cache] = next((cache for cache in caches if cache is not None), None)
        return given

    def why_whole(self, given: _Given) -> str:
        """Why a call cannot be split exactly; empty where it can be."""
        return next(self._reasons(given), "")

    def _reasons(self, given: _Given) -> Iterator[str]:
        if getattr(self.config, "is_encoder_decoder", False):
            yield "it is an encoder-decoder"
        if not self.cache:
            yield "its forward takes no cache"
            return
        cache = given[self.cache] if given[self.cache] is not None else DynamicCache(config=self.config)
        yield from why_not(cache)
        if not getattr(self.config, "is_causal", True) or getattr(self.config, "use_bidirectional_attention", None):
            yield "its tokens see those behind them"
        for name in FOR_ALL:
            value = given[name] if given.get(name) is not None else getattr(self.config, name, None)
            if value is not None and value is not False:
                yield f"it is called with {name}"
        yield from _odd(given, given[self.cache])


def length_of(given: _Given) -> tuple[int, int] | None:
    """Rows and tokens a row; None where nothing enters that has any."""
    entering = next((given[name] for name in ENTERING if given.get(name) is not None), None)
    if not isinstance(entering, Tensor) or entering.dim() < 2:
        return None
    return entering.shape[0], entering.shape[1]


def part_of(given: _Given, past: int, start: int, stop: int) -> dict[str, Any]:
    """The arguments for tokens ``start`` to ``stop``, in front of which ``past`` positions were in the cache."""
    part = dict(given)
    for name in ENTERING:
        if given.get(name) is not None:
            part[name] = given[name][:, start:stop].contiguous()
    for name in PER_TOKEN:
        if given.get(name) is not None:
            part[name] = given[name][..., start:stop]
    mask = given.get("attention_mask")
    if mask is not None:
        part["attention_mask"] = mask[:, : past + stop] if mask.dim() == 2 else mask[:, :, start:stop, : past + stop]
    return part


def positions_in(cache: Any) -> int:
    """How many positions a cache holds; 0 for what has none."""
    if not isinstance(cache, Cache) or not cache.layers or all(cache.is_linear):
        return 0
    return int(cache.get_seq_length())


def why_not(cache: Any) -> Iterator[str]:
    """Why chunks cannot hand a cache on from one to the next."""
    if cache is not None and (not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache)):
        yield f"its cache is a {type(cache).__name__}"
    elif cache is not None and any(cache.is_linear):
        yield "its cache keeps a recurrent state"


def _odd(given: _Given, cache: Any) -> Iterator[str]:
    """What does not go with the tokens, one by one."""
    batch, length = length_of(given) or (0, 0)
    columns = positions_in(cache) + length
    for name, value in given.items():
        if value is None or isinstance(value, bool | int | float | str | torch.dtype | Cache) or name in ENTERING:
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if name == "attention_mask":
            sliding = cache is not None and any(cache.is_sliding)
            if shape != (batch, columns) and (shape[2:] != (length, columns) or sliding):
                what = list(shape) if shape else f"a {type(value).__name__}"
                yield f"its attention mask is {what}, not {[batch, columns]}"
        elif name not in PER_TOKEN:
            yield f"it is called with {name}"
        elif shape[-1:] != (length,):
            yield f"its {name} are {list(shape)} for {length} tokens"
        elif name.endswith("mm_token_type_ids") and bool(value.any()):
            yield f"its {name} say that some tokens are no text"
    if given.get("use_cache") is False and given.get("attention_mask") is None and _restarts(given.get("position_ids")):
        yield "its position_ids tell several texts apart"


def _restarts(position_ids: Any) -> bool:
    return isinstance(position_ids, Tensor) and bool((torch.diff(position_ids, dim=-1) != 1).any())
