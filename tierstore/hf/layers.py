"""The layers that a decoder's hidden states go through one after another, and what each of them is called with.

A model is run with stand-ins in place of its layers, which compute nothing and only see how they are called. So a
layer can then be run alone, as the model would, and no more than one has to be in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from tierstore.errors import ModuleError

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside hidden states."""

    by_name: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that ``layer`` makes of ``hidden``."""
        given = {**self.kwargs, HIDDEN: hidden} if self.by_name else self.kwargs
        made = layer(*self.args, **given) if self.by_name else layer(hidden, *self.args, **given)
        return cast(Tensor, made if isinstance(made, Tensor) else made[0])

    def is_like(self, other: Call) -> bool:
        """Whether both give the same, in all that is a tensor."""
        mine, theirs = ([x for x in tree_leaves((c.args, c.kwargs)) if isinstance(x, Tensor)] for c in (self, other))
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def layers_path(model: nn.Module) -> str:
    """The name of the list of ``model`` that has the most parameters. Raises ``ModuleError`` where there is none."""
    sizes: dict[str, int] = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not sizes:
        raise _no_decoder(model, "it has no list of layers")
    return max(sizes, key=lambda name: sizes[name])


class DecoderLayers:
    """Stand-ins in ``model`` for its layers, which the list at ``path`` holds.

    All other tensors of ``model`` that it uses must be there; those of the layers are not used.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self._model = model
        found = cast(nn.ModuleList, model.get_submodule(path))
        self._run = _Run(0)
        self._count = len(found)
        for number, layer in enumerate(found):
            found[number] = _StandIn(layer, number, self)

    def begin(self, tokens: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """What enters the first layer for ``tokens``, int64 [1, length], and how each layer is called.

        Raises ``ModuleError`` for a model whose forward does anything but hand hidden states from layer to layer.
        """
        tries: list[tuple[int, str]] = []
        for as_tuple in (False, True):  # what layers give differs from model to model
            self._run = _Run(self._count, as_tuple)
            problem = self._forward(tokens) or self._run.problem
            called = len(self._run.calls)
            if not problem and called == self._count:
                return self._run.first[0], tuple(self._run.calls)
            tries.append((called, problem or f"it calls {called} of its {self._count} layers"))
        raise _no_decoder(self._model, max(tries, key=lambda tried: tried[0])[1])

    def finish(self, tokens: Tensor, hidden: Tensor, path: str) -> Tensor | None:
        """What the module at ``path``, behind the layers, is given when the last one gives ``hidden``.

        None where it is not called with a tensor. It is not run.
        """
        seen: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.extend(arg for arg in args[:1] if isinstance(arg, Tensor))
            raise _Enough

        self._run = _Run(self._count, self._run.as_tuple, hidden)
        handle = self._model.get_submodule(path).register_forward_pre_hook(catch)
        try:
            self._forward(tokens)
        finally:
            handle.remove()
        return seen[0] if seen else None

    def visited(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the stand-in for layer ``number`` gives when it is called so."""
        return self._run.visit(number, args, kwargs)

    def _forward(self, tokens: Tensor) -> str:
        """Run the model; why that could not be done."""
        try:
            self._model(input_ids=tokens, use_cache=False)
        except _Enough:
            return ""
        except Exception as error:
            return f"its forward fails when its layers change nothing: {type(error).__name__}: {error}"
        return ""


class _Enough(Exception):
    """Ends a forward of which nothing more is needed."""


class _StandIn(nn.Module):
    def __init__(self, layer: nn.Module, number: int, layers: DecoderLayers) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is no submodule
        self._number, self._layers = number, layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._layers.visited(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


@dataclass
class _Run:
    """One forward: the calls so far, and why they are not those of a decoder."""

    count: int
    as_tuple: bool = False
    final: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    problem: str = ""

    def visit(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_name = HIDDEN in kwargs
        hidden = kwargs.pop(HIDDEN) if by_name else args[0] if args else None
        if number != len(self.calls):
            self.problem = f"it calls layer {number} where layer {len(self.calls)} is next"
        elif not isinstance(hidden, Tensor):
            self.problem = f"layer {number} is given no hidden states"
        elif self.first and hidden is not self.first[0]:
            self.problem = f"layer {number} is given something else than what the layer before gives"
        elif any(isinstance(leaf, Cache) for leaf in tree_leaves((args, kwargs))):
            self.problem = f"layer {number} is given a cache"
        if self.problem:
            raise _Enough
        self.first.append(cast(Tensor, hidden))
        self.calls.append(Call(by_name, args if by_name else args[1:], kwargs))
        if len(self.calls) == self.count:
            if self.final is None:
                raise _Enough
            hidden = self.final
        return (hidden,) if self.as_tuple else hidden


def _no_decoder(model: nn.Module, why: str) -> ModuleError:
    return ModuleError(
        f"{type(model).__name__} cannot be calibrated: {why}, and only models whose hidden states go from one layer "
        "of a list to the next can be: pack it without calibration"
    )
