"""What a cache hands to attention instead of keys and values: where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tierstore.hf.kv.lazy import LazyTensor


@dataclass
class LayerStates:
    """The keys and values of one layer in one pass: ``source`` knows their pages, ``gather`` gives them whole, keys
    [B, Hkv, L, Dk] and values [B, Hkv, L, Dv], in the order of the batch's columns. With an ``expansion`` these are
    what keys and values are made from."""

    source: Any
    layer: int
    gather: Callable[[int], tuple[Tensor, Tensor]]
    expansion: Any = None
    whole: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Keys and values as plain tensors, gathered once."""
        if self.whole is None:
            self.whole = self.gather(self.layer)
            if self.expansion is not None:
                self.whole = self.expansion.make(*self.whole)
        return self.whole

    def expanded(self, expansion: Any) -> LayerStates:
        """What ``expansion`` makes of the same pages, once it is asked for."""
        return replace(self, expansion=expansion, whole=None)


class PagedStates(LazyTensor):
    """Keys or values [B, Hkv, L, D] that stand in pages. Attention that knows pages reads ``states``; whatever else
    touches them gets plain tensors, gathered for it."""

    states: LayerStates
    part: int

    @classmethod
    def of(cls, states: LayerStates, part: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """The keys (``part`` 0) or the values (1) of ``states``."""
        made = cls.shaped(shape, dtype, device)
        made.states, made.part = states, part
        return made

    def computed(self) -> Tensor:
        return self.states.gathered()[self.part]
