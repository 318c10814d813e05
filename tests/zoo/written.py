"""Modules that write to their own buffers and parameters."""

# To torch's types an attribute of a module is a Tensor or a Module; what is written here is what people write.
# mypy: disable-error-code="arg-type, assignment, attr-defined, call-overload, has-type, index, misc, no-any-return"
# mypy: disable-error-code="no-untyped-call, operator, override, union-attr"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import entry, floats


def _layers(count: int, size: int = 16) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(size, size) for _ in range(count)])


@entry(floats(3, 16))
class Counters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _layers(3)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("hidden", torch.ones(16), persistent=False)

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
            self.hidden = self.hidden * 0.9
        for layer in self.layers:
            x = layer(x)
        return x + self.mean + self.hidden, self.count


@entry(floats(3, 16))
class Statistics(nn.Module):
    """F.batch_norm over buffers that are larger than the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        for number in range(4):
            self.register_buffer(f"mean{number}", torch.zeros(512))
            self.register_buffer(f"var{number}", torch.ones(512))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).repeat(1, 32)
        for number in range(4):
            mean, var = getattr(self, f"mean{number}"), getattr(self, f"var{number}")
            x = F.batch_norm(x, mean, var, training=True, momentum=0.2)
        return x


@entry(floats(3, 16))
class Cache(nn.Module):
    """A big buffer, written piece by piece, that is never reset."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _layers(3)
        self.register_buffer("keys", torch.zeros(64, 16))
        self.register_buffer("values", torch.zeros(2, 32, 16))
        self.at = 0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        with torch.no_grad():
            for row in x:
                self.keys[self.at % 64] = row
                self.values[:, self.at % 32].add_(row)
                self.at += 1
            self.keys.index_copy_(0, torch.tensor([1]), x[:1])
        return x @ self.keys.T.clone() @ self.keys.clone() + self.values.clone().sum((0, 1))


@entry(floats(3, 16))
class Rebinds(nn.Module):
    """Gives its buffers new tensors, of other shapes too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _layers(3)
        self.register_buffer("state", torch.zeros(256))
        self.register_buffer("grows", torch.zeros(300))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        with torch.no_grad():
            self.state = self.state + x.mean()
            self.grows = torch.cat([self.grows, x.mean()[None]])
        return x + self.state[:16].clone() + self.grows.sum()


@entry(floats(3, 16))
class WritesParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data.clamp_(-0.2, 0.2)
        self.b.weight.data = self.b.weight.data * 0.9
        with torch.no_grad():
            self.c.weight.mul_(0.95)
            self.c.bias[2:5] = 0.5
            self.d.weight.copy_(self.d.weight.flip(0))
            self.d.bias.detach().numpy()
        return self.d(self.c(self.b(self.a(x))))


@entry(floats(3, 16))
class WritesItself(nn.Module):
    """Writes in its own turn, in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Writer() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) * 0.2)
        self.extra = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.mul_(0.9)
        view = self.extra.data
        y = x @ self.weight
        view.add_(0.01)
        return y + self.extra


@entry(floats(3, 16), edits=False)
class NormalisesData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data /= self.a.weight.data.norm(dim=1, keepdim=True)
        self.b.weight.data = F.normalize(self.b.weight.data, dim=1)
        return self.b(self.a(x))


@entry(floats(3, 16), grads=False, edits=False, copies=False)
class DeletesParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.c = nn.Linear(16, 16)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            del self.b.weight
            self.b.weight = nn.Parameter(torch.eye(16))
            self.c.register_parameter("bias", None)
        return self.c(self.b(self.a(x)))
