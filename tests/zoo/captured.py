"""Weights that somebody holds: before the session, or beyond the forward that read them."""

# To torch's types an attribute of a module is a Tensor or a Module; what is written here is what people write.
# mypy: disable-error-code="arg-type, assignment, attr-defined, call-overload, has-type, index, misc, no-any-return"
# mypy: disable-error-code="no-untyped-call, operator, override, union-attr"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.registry import entry, floats


@dataclass
class _Bag:
    weight: Tensor


@entry(floats(3, 16), copies=False)
class Captured(nn.Module):
    """Weights in a list, a dict, a tuple, a closure and a dataclass, from before it is offloaded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(5)])
        weights: list[Any] = [layer.weight for layer in self.layers]
        self.in_list = [weights[0]]
        self.in_dict = {"w": weights[1]}
        self.in_tuple = (weights[2],)
        self.in_bag = _Bag(weights[3])
        self.in_closure = lambda x: x @ weights[4]

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.in_list[0] @ self.in_dict["w"]
        x = self.in_closure(x @ self.in_tuple[0] @ self.in_bag.weight)
        for layer in self.layers:
            x = layer(x)
        return x


@entry(floats(3, 16), copies=False)
class CapturedView(nn.Module):
    """A view of a weight, taken before it is offloaded, that sees later writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.last = nn.Linear(16, 16)
        self.rows = self.layer.weight.detach()[2:6]
        self.parts = [self.layer.weight.detach().T]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.mul_(0.9)
        return self.last(self.layer(x)) @ self.parts[0] + self.rows.sum()


@entry(floats(3, 16), copies=False)
class CachesView(nn.Module):
    """Keeps a view of a weight on itself in forward, and uses it in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        for kept in self.kept:
            x = x + kept.sum()
        self.kept = []
        for layer in self.layers:
            x = layer(x)
            self.kept.append(layer.weight.detach()[:4])
        return x


@entry(floats(3, 16))
class ReturnsParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return {"y": y, "whole": self.a.weight, "view": [self.a.weight[1:3], self.b.bias.expand(3, 16)]}


@entry(floats(3, 16), copies=False)
class Generates(nn.Module):
    """A generator that reads weights when nothing is running any more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Lazy()
        self.b = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        steps, finish = self.inner(x)
        for y in steps:
            x = x + self.b(y)
        return finish(x)


class _Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: Tensor) -> Any:
        def steps() -> Iterator[Tensor]:
            for layer in self.layers:
                yield layer(x) + layer.weight.sum()

        weight = self.layers[1].weight
        return steps(), lambda y: y @ weight
