"""Gradients of a decoder with little memory: what enters a layer is kept, all else is computed again on the way back.

This is activation checkpointing (Chen et al. 2016, arXiv 1604.06174), by torch's own ``checkpoint``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tierstore.binding.forwards import interpose, withdraw
from tierstore.errors import ModuleError
from tierstore.hf.layers import layers_path
from tierstore.hf.splitting import CACHES


class RecomputedLayers:
    """From now on to ``close()``, forwards of ``module`` that record gradients keep only what enters each layer.

    The backward then runs every layer once more, last one first; where weights stream, they are brought again for it.
    Gradients are those of the plain module, bit by bit, dropout included. Forwards without gradients are as they were.
    Such a forward makes no cache unless it is told to, and then raises ``ModuleError``: a layer that runs again would
    add to it again. Raises ``ModuleError`` for a module without a list of layers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._caches = "use_cache" in inspect.signature(module.forward).parameters
        self._layers = list(module.get_submodule(layers_path(module)).children())
        for layer in self._layers:
            interpose(layer, self._through_layer, outermost=True)
        interpose(module, self._through_model, outermost=True)

    def close(self) -> None:
        """Leave the module as it was found. Idempotent."""
        withdraw(self._module, self._through_model)
        for layer in self._layers:
            withdraw(layer, self._through_layer)

    def _through_layer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return cast(Any, checkpoint)(forward, *args, use_reentrant=False, **kwargs)

    def _through_model(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not any(each.requires_grad for each in self._module.parameters()):
            return forward(*args, **kwargs)
        if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHES):
            raise ModuleError(
                f"{type(self._module).__name__} records gradients and is to fill a cache, which layers that run again "
                "would fill twice: call it with use_cache=False, or in torch.no_grad()"
            )
        return forward(*args, **(kwargs | {"use_cache": False} if self._caches else kwargs))
