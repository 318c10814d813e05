"""Keeps what a run gave, and compares two runs bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch


def is_wrapper(tensor: Tensor) -> bool:
    return bool(_python_dispatch.is_traceable_wrapper_subclass(tensor))


def inside_of(tensor: Any) -> dict[str, Tensor]:
    """The tensors that a wrapper subclass is made of."""
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def leaves_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves_of(item)


def freeze(value: Any) -> Any:
    """``value`` with plain copies of its tensors, that nothing changes any more."""
    if isinstance(value, Tensor):
        if is_wrapper(value) and type(value).__name__ not in ("GhostTensor", "GhostParameter"):
            return freeze(inside_of(value))
        with torch.no_grad():
            copied = value.detach().clone()
            if type(copied) is not Tensor:
                copied = copied.as_subclass(Tensor)
            return copied
    if isinstance(value, Mapping):
        return {k: freeze(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [freeze(v) for v in value]
    if isinstance(value, int | float | str | bytes | bool | torch.dtype | torch.device | type(None)):
        return value
    return {k: freeze(v) for k, v in vars(value).items() if isinstance(v, Tensor | list | tuple | dict)}


def same(a: Any, b: Any) -> bool:
    """Whether two frozen values are equal, tensors bit for bit (NaN is equal to NaN)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.layout is not torch.strided or b.layout is not torch.strided:
            return a.layout == b.layout and same(a.to_dense(), b.to_dense())
        if a.is_quantized or b.is_quantized:
            return torch.equal(a, b)
        return torch.equal(a, b) or torch.equal(torch.view_copy(_bits(a), torch.uint8), _bits(b).view(torch.uint8))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b)
    return bool(type(a) is type(b) and a == b)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)


def difference(a: Any, b: Any, path: str = "") -> str:
    """Where two frozen values first differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *b]:
            if key not in a or key not in b:
                return f"{path}.{key} only on one side"
            if not same(a[key], b[key]):
                return difference(a[key], b[key], f"{path}.{key}")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            if not same(x, y):
                return difference(x, y, f"{path}[{number}]")
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        return f"{path}: {int((a != b).sum())} of {a.numel()} elements of {tuple(a.shape)}, {a.dtype}"
    return f"{path}: {str(a)[:80]} became {str(b)[:80]}"
