"""What a model keeps of one sequence: a transformers cache of its own, which can be copied, cut and put back."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache

from tierstore.hf.splitting import Forward


def make_cache(module: Any, forward: Forward) -> Any:
    """The cache that ``generate`` would make for ``module``; None where it takes none of that kind.

    Layers with a window keep what is behind it until they are trimmed."""
    supported = getattr(module, "_supports_default_dynamic_cache", None)
    if not forward.cache or (supported is not None and not supported()):
        return None
    cache: Any = DynamicCache(config=module.config.get_text_config(decoder=True))
    if hasattr(cache, "activate_past_recording") and not is_recurrent(cache):
        cache.activate_past_recording()
    return cache


def is_recurrent(cache: Any) -> bool:
    """Whether a layer keeps a state of what it has seen: it cannot go back, nor surely on with several tokens."""
    return any(hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states") for layer in cache.layers)


def is_croppable(cache: Any) -> bool:
    """Whether the last tokens can be taken out again: of a recurrent state they cannot, and of a window that has moved
    on only where the layer keeps what was in it."""
    windows = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    return not is_recurrent(cache) and all(getattr(layer, "record_past", False) for layer in windows)


class Single:
    """One sequence: its ``tokens``, and what ``cache`` keeps of them. Without a cache all are computed every time."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.tokens: list[int] = []
        self._least = 0  # positions that are there to stay, as windows have moved on
        self._before: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache takes."""
        layers = [] if self.cache is None else self.cache.layers
        found = {id(leaf): leaf for layer in layers for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor)}
        return sum(leaf.numel() * leaf.itemsize for leaf in found.values())

    def copy(self) -> Single:
        """Another sequence with the same tokens, which shares nothing with this one."""
        other = Single(copy.deepcopy(self.cache))
        other.tokens, other._least = list(self.tokens), self._least
        return other

    def begin(self) -> None:
        """More tokens are about to come: what is behind windows goes, and where ``undo`` goes back to is noted."""
        if self.cache is None:
            return
        for layer in self.cache.layers:
            if _moves_on(layer) and layer.record_past:
                layer.crop(0)
                self._least = len(self.tokens)
        self._before = [_length(layer) for layer in self.cache.layers]

    def undo(self, length: int) -> None:
        """Take out what came since ``begin``, when there were ``length`` tokens: not all layers need have it."""
        for layer, before in zip(self.cache.layers if self.cache is not None else (), self._before, strict=False):
            _cut(layer, before)
        del self.tokens[length:]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens. Raises ``ValueError`` where a window has moved on from them."""
        if self.cache is not None:
            if length < self._least:
                raise ValueError(f"the sequence cannot be cut to {length} tokens: its windows begin at {self._least}")
            if any(_moves_on(layer) for layer in self.cache.layers):
                self._least = length
            for layer in self.cache.layers:
                _cut(layer, max(_length(layer) - (len(self.tokens) - length), 0))
        del self.tokens[length:]


def _moves_on(layer: Any) -> bool:
    """Whether the layer has a window that is full."""
    window = getattr(layer, "sliding_window", None)
    return bool(getattr(layer, "is_sliding", False) and window and _length(layer) >= window)


def _length(layer: Any) -> int:
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0


def _cut(layer: Any, length: int) -> None:
    over = _length(layer) - length
    if over > 0:
        layer.crop(-over)
