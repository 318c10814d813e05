"""Weights of every layout, dtype and class."""

# To torch's types an attribute of a module is a Tensor or a Module; what is written here is what people write.
# mypy: disable-error-code="arg-type, assignment, attr-defined, call-overload, has-type, index, misc, no-any-return"
# mypy: disable-error-code="no-untyped-call, operator, override, union-attr"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tests.zoo.registry import add, entry, floats


class _Weights(nn.Module):
    """Parameters as ``make`` gives them, and a linear layer beside each."""

    def __init__(self, *weights: Any) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            self.register_parameter(f"w{number}", weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in weights])

    def forward(self, x: Tensor) -> Any:
        seen = []
        for number, layer in enumerate(self.layers):
            weight = getattr(self, f"w{number}")
            x = layer(x) + weight.abs().sum().float() * 0.01
            seen.append(weight.is_contiguous())
        return x, seen


def _weights(name: str, make: Callable[[], list[Any]], **how: Any) -> None:
    add(name, lambda: _Weights(*make()), floats(3, 16), **how)


_weights("transposed", lambda: [torch.randn(16, 24).T, torch.randn(4, 5, 6).permute(2, 0, 1)])
_weights("channels_last parameter", lambda: [torch.randn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last)])
_weights("scalars and ones", lambda: [torch.tensor(2.0), torch.randn(1), torch.randn(1, 1, 1), torch.randn(16)])
_weights("empty parameter", lambda: [torch.empty(0), torch.empty(0, 5), torch.randn(16, 16)])
# writing to memory that several elements share is an error in plain torch too
_weights(
    "expanded", lambda: [torch.randn(16, 1).expand(16, 8), torch.randn(16)], edits=False, copies=False, grads=False
)
_weights("as_strided", lambda: [torch.randn(100).as_strided((5, 4), (11, 2), 3), torch.randn(64)[::4]])
_weights("misaligned", lambda: [torch.randn(257)[1:].view(16, 16), torch.randn(300)[7:263].view(16, 16)])
_weights("float64", lambda: [torch.randn(16, 16, dtype=torch.float64), torch.randn(3, dtype=torch.float64)])
_weights("half", lambda: [torch.randn(16, 16).half(), torch.randn(33).bfloat16()])
_weights(
    "complex", lambda: [torch.randn(8, 8, dtype=torch.complex64), torch.randn(4, dtype=torch.complex128)], grads=False
)
_weights(
    "integers",
    lambda: [
        nn.Parameter(torch.randint(-9, 9, (16, 16), dtype=torch.int8), False),
        nn.Parameter(torch.randint(0, 9, (9,)), False),
    ],
)


def _flat() -> nn.Module:
    """Parameters that are views of one memory, as FSDP keeps them."""
    module = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    flat = torch.randn(sum(p.numel() for p in module.parameters())) * 0.2
    at = 0
    for parameter in module.parameters():
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    return module


add("one flat memory", _flat, floats(3, 16))


@entry(floats(3, 16), copies=False)
class Overlapping(nn.Module):
    """Parameters whose memories overlap: a write to one is seen through the other."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(24, 16) * 0.3
        self.upper = nn.Parameter(base[:16])
        self.lower = nn.Parameter(base[8:])
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.upper.mul_(0.9)
        return self.layer(x @ self.lower) @ self.upper


@entry(floats(3, 16))
class Buffers(nn.Module):
    """Buffers of many dtypes, larger than the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.register_buffer("as_int8", torch.randint(-99, 99, (64, 16), dtype=torch.int8))
        self.register_buffer("as_bools", torch.rand(64, 16) > 0.5)
        self.register_buffer("as_half", torch.randn(64, 16).half())
        self.register_buffer("as_bfloat", torch.randn(64, 16).bfloat16())
        self.register_buffer("as_double", torch.randn(64, 16).double())
        self.register_buffer("as_complex", torch.randn(64, 16, dtype=torch.complex64))
        self.register_buffer("as_long", torch.arange(64))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        rows = (
            self.as_int8.float() * self.as_bools
            + self.as_half.float()
            + self.as_bfloat.float()
            + self.as_double.float()
        )
        return x + rows[self.as_long % 7].sum(0) + self.as_complex.abs().sum(0)


class Eightbit(Tensor):
    """A weight as int8 and a scale, that dequantises for whatever is done with it."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Eightbit:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)
        return made

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes = codes
        self.scale = scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Eightbit:
        return cls(inner["codes"], inner["scale"])

    def plain(self) -> Tensor:
        codes = self.codes.plain() if isinstance(self.codes, Eightbit) else self.codes
        return codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Eightbit(args[0].codes, args[0].scale)
        if func is torch.ops.aten.clone.default:
            return Eightbit(args[0].codes.clone(), args[0].scale.clone())
        return func(
            *tree_map_only(Eightbit, Eightbit.plain, args), **tree_map_only(Eightbit, Eightbit.plain, kwargs or {})
        )


def quantised(rows: int, columns: int) -> Eightbit:
    return Eightbit(torch.randint(-99, 99, (rows, columns), dtype=torch.int8), torch.rand(rows, 1) * 0.01)


def nested(rows: int, columns: int) -> Eightbit:
    return Eightbit(quantised(rows, columns), torch.rand(rows, 1) * 0.01)


def _quantised(make: Callable[[int, int], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
        for layer in module:
            layer.weight = nn.Parameter(make(32, 32), requires_grad=False)
        return module

    return build


add("quantised", _quantised(quantised), floats(3, 32), edits=False, copies=False)
add("quantised twice", _quantised(nested), floats(3, 32), edits=False, copies=False)


class Named(Tensor):
    """A plain subclass that counts what is done with it; it stays in memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@entry(floats(3, 16), copies=False)
class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.register_buffer("named", torch.randn(16).as_subclass(Named))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.Tensor.as_subclass(x + self.named, Tensor)
