"""Weights that are computed, pruned, tied, shared or read from elsewhere."""

# To torch's types an attribute of a module is a Tensor or a Module; what is written here is what people write.
# mypy: disable-error-code="arg-type, assignment, attr-defined, call-overload, has-type, index, misc, no-any-return"
# mypy: disable-error-code="no-untyped-call, operator, override, union-attr"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.zoo.registry import add, entry, floats, ints


def _each(change: Any, *, size: int = 24, count: int = 4) -> Any:
    def build() -> nn.Module:
        return nn.Sequential(*[change(nn.Linear(size, size)) for _ in range(count)])

    return build


def _pruned(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(module, "weight", amount=0.3)
    prune.random_structured(module, "weight", amount=0.2, dim=0)
    return module


class _Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((24, 1), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _custom(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", _Symmetric())
    parametrize.register_parametrization(module, "weight", _Scaled())
    return module


# deepcopy of a weight that a hook computed with gradients fails in plain torch too
add("old weight_norm", _each(nn.utils.weight_norm), floats(3, 24), copies=False)
add("old spectral_norm", _each(nn.utils.spectral_norm), floats(3, 24), copies=False)
add("weight_norm", _each(parametrizations.weight_norm), floats(3, 24))
add("spectral_norm", _each(parametrizations.spectral_norm), floats(3, 24))
add("orthogonal", _each(parametrizations.orthogonal, size=12), floats(3, 12))
add("custom parametrization", _each(_custom), floats(3, 24))
add("pruning", _each(_pruned), floats(3, 24), copies=False)


@entry(floats(3, 24))
class CachedParametrization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = _custom(nn.Linear(24, 24))
        self.other = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            for _ in range(3):
                x = self.other(self.layer(x))
        return x


@entry(floats(3, 16), copies=False)
class HooksReadWeights(nn.Module):
    """Forward, pre- and full backward hooks that look at weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.seen: list[Tensor] = []
        self.back: list[Tensor] = []
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda m, args: (args[0] + m.weight.mean(),))
            layer.register_forward_hook(lambda m, args, out: out * m.bias.sum())
            layer.register_full_backward_hook(lambda m, gi, go: self.back.append(m.weight.detach().sum()))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        back, self.back = list(self.back), []
        return x, back


@entry(floats(3, 16))
class HookWritesWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        for layer in self.layers:
            layer.register_forward_pre_hook(_decay)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _decay(module: nn.Module, args: Any) -> None:
    with torch.no_grad():
        module.weight.mul_(0.99)


@entry(ints(50, 2, 4))
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.block = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)))


@entry(floats(3, 16))
class TiedBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])
        for layer in self.layers[3:]:
            layer.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


@entry(floats(3, 16), copies=False)
class BufferIsParameter(nn.Module):
    """A buffer and a parameter that are one memory."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("table", self.layer.weight.detach())
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.table.mul_(0.9)
        return self.last(self.layer(x.detach())).detach() + self.table.sum()


@entry(floats(3, 16))
class SharedLayer(nn.Module):
    """One block, entered many times, beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(4)])
        self.again = self.block

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x + self.block(x)) + self.again(x)
        return x


@entry(floats(3, 16))
class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(16, 16)
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        if not depth:
            return x
        return self.up(self(self.down(x).tanh(), depth - 1))


@entry(floats(3, 16))
class ReadsChildren(nn.Module):
    """A parent that uses its children's weights without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.c = nn.Linear(16, 16)
        self.own = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.b.weight, self.a.bias)
        x = torch.einsum("bi,ij,kj->bk", x, self.a.weight, self.own)
        return self.c(x) + (x @ self.c.weight.T) @ self.own[:, ::2] @ self.own[::2]


@entry(floats(3, 16))
class Concatenates(nn.Module):
    """All weights in one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        fused = torch.cat([layer.weight for layer in self.layers])
        stacked = torch.stack([layer.bias for layer in self.layers])
        y = F.linear(x, fused)
        for layer in self.layers:
            x = layer(x)
        return y.sum() + x + stacked.sum(0)


@entry(floats(3, 16))
class BareRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(16, 16))
        self.b = nn.Parameter(torch.randn(16, 16))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_parameter("none", None)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x: Tensor) -> Any:
        return (x @ self.a @ self.b) * self.scale + self.shift
