"""Modules whose order changes, or that break off, or that run under what changes torch's ways."""

# To torch's types an attribute of a module is a Tensor or a Module; what is written here is what people write.
# mypy: disable-error-code="arg-type, assignment, attr-defined, call-overload, has-type, index, misc, no-any-return"
# mypy: disable-error-code="no-untyped-call, operator, override, union-attr"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.registry import Expected, Interrupted, add, entry, floats, ints


def _layers(count: int, size: int = 16) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(size, size) for _ in range(count)])


class _Layers(nn.Module):
    count = 5

    def __init__(self) -> None:
        super().__init__()
        self.layers = _layers(self.count)
        self.calls = 0


@entry(floats(3, 16))
class Experts(_Layers):
    """Routes each row by its values to experts that were perhaps not used before."""

    count = 8

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        scores = self.router(x).softmax(-1)
        chosen = scores.topk(2).indices
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).any(-1).nonzero()[:, 0]
            out = out.index_add(0, rows, self.layers[expert](x[rows]) * scores[rows, expert, None])
        return out


@entry(floats(3, 16))
class ChangesOrder(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for number in range(5):
            x = self.layers[(number * (self.calls % 4 + 1) + self.calls) % 5](x).tanh()
        return x


@entry(floats(3, 16))
class ExitsEarly(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in list(self.layers)[: self.calls % 6]:
            x = layer(x)
        return x


@entry(floats(3, 16), grads=False)
class Raises(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for number, layer in enumerate(self.layers):
            if self.calls % 3 == 0 and number == 3:
                raise Expected("in the middle")
            x = layer(x)
        return x


@entry(floats(3, 16), grads=False)
class IsInterrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), _Trap(at)) for at in (2, 5, 7)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Trap(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.calls = 0
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.layer(x)
        if self.calls == self.at:
            raise Interrupted("as by Ctrl-C")
        return x


@entry(floats(3, 16))
class Checkpointed(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: layer(y).tanh() @ layer.weight, x, use_reentrant=False)
        return x


@entry(floats(3, 16))
class Autocast(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.layers:
                x = layer(x)
            x = self.layers[0](x) @ self.layers[1].weight
        return x.float()


@entry(floats(3, 16))
class GradientInside(_Layers):
    """Gradients are wanted inside of a forward that has none."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            y = x.clone().detach().requires_grad_()
            z = y
            for layer in self.layers:
                z = layer(z).tanh()
            (slope,) = torch.autograd.grad(z.sum(), y)
        return self.layers[0](x) + slope


@entry(floats(3, 16))
class Functional(_Layers):
    """functional_call, vmap and grad over the weights."""

    def forward(self, x: Tensor) -> Tensor:
        weights = {n: p * 0.5 for n, p in self.layers[0].named_parameters()}
        y = torch.func.functional_call(self.layers[0], weights, (x,))
        z = torch.func.vmap(lambda row: F.linear(row, self.layers[1].weight))(x)
        stacked = torch.stack([layer.weight for layer in self.layers])
        every = torch.func.vmap(lambda w: x @ w)(stacked)
        return self.layers[2](y + z) + every.sum(0)


@entry(floats(3, 16))
class Frozen(_Layers):
    def __init__(self) -> None:
        super().__init__()
        for layer in list(self.layers)[::2]:
            layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@entry(floats(3, 16))
class ParameterHooks(_Layers):
    """Hooks on the parameters themselves, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].weight.register_hook(lambda grad: grad * 2)
        self.layers[1].weight.register_post_accumulate_grad_hook(_halve)
        self.layers[2].weight.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + len(getattr(self.layers[2].weight, "note", "kept"))


def _halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad * 0.5


add(
    "a list of modules",
    lambda: nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16))), nn.Linear(16, 16)),
    floats(3, 16),
)


@entry(ints(40, 2, 5), copies=False)
class Scripted(nn.Module):
    """A child that is a ScriptModule stays."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.child = torch.jit.script(nn.Linear(16, 16))
        self.layers = _layers(4)

    def forward(self, x: Tensor) -> Any:
        y = self.child(self.embed(x))
        for layer in self.layers:
            y = layer(y)
        return y
