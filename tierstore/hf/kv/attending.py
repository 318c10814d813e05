"""Which attention a decoder computes with, and another one for as long as a forward lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from tierstore.binding.baton import uninterleaved


def attention_configs(module: nn.Module) -> list[Any]:
    """The config objects that the attention of the decoder reads."""
    text: Any = module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    found = {id(text): text}
    for each in module.modules():
        config = getattr(each, "config", None)
        if isinstance(getattr(each, "layer_idx", None), int) and type(config) is type(text):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def attending(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Within, the model of ``configs`` attends by the function that is registered under ``name``."""
    before = [config._attn_implementation_internal for config in configs]
    with uninterleaved():
        try:
            for config in configs:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, own in zip(configs, before, strict=True):
                config._attn_implementation_internal = own
