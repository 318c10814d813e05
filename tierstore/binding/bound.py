"""Tensors over a slot that stand in a module during its unit's turn, where they cost nothing."""

from __future__ import annotations

import zlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from tierstore.binding.ghosts import check_replacement, plain_copy

_RAW: Any = cast(Any, Tensor).data
_CHECKSUM = "_tierstore_checksum"


class _Exposing:
    """Notes when ``.data`` or ``.numpy()`` is handed out: a write through them leaves no other trace."""

    __torch_function__ = cast(Any, torch._C)._disabled_torch_function_impl

    @property
    def data(self: Any) -> Tensor:
        _expose(self)
        return cast(Tensor, _RAW.__get__(self))

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        check_replacement(self, value)
        _expose(self)
        _RAW.__get__(self).copy_(value)

    def numpy(self: Any, *, force: bool = False) -> Any:
        _expose(self)
        return Tensor.numpy(self, force=force)

    def __array__(self: Any, *args: Any, **kwargs: Any) -> Any:
        _expose(self)
        return cast(Any, Tensor).__array__(self, *args, **kwargs)

    def __dlpack__(self: Any, *args: Any, **kwargs: Any) -> Any:
        _expose(self)
        return Tensor.__dlpack__(self, *args, **kwargs)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = plain_copy(self, memo)
        return memo[id(self)]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return cast(Any, plain_copy(self)).__reduce_ex__(protocol)


class BoundParameter(_Exposing, nn.Parameter):
    """A parameter over a slot."""


class BoundTensor(_Exposing, Tensor):
    """A buffer over a slot."""


def can_bind(ghost: Tensor) -> bool:
    """Whether every write is seen: batch_norm writes its statistics, 1-D buffers, without a new version of them."""
    return isinstance(ghost, nn.Parameter) or ghost.dim() != 1 or not ghost.is_floating_point()


def bind(memory: Tensor, ghost: Tensor) -> Tensor:
    """``memory``, a plain view of a slot, in the role of ``ghost`` and sharing its attributes."""
    bound: Tensor
    if isinstance(ghost, nn.Parameter):
        bound = BoundParameter(memory, ghost.requires_grad)
    else:
        bound = memory.as_subclass(BoundTensor)
    bound.__dict__ = ghost.__dict__
    return bound


def take_gradient(bound: Tensor, ghost: Tensor) -> None:
    """Add what was accumulated in ``bound`` to the gradient of the parameter that it stood for."""
    gradient, bound.grad = bound.grad, None
    if gradient is not None:
        ghost.grad = gradient if ghost.grad is None else ghost.grad + gradient


def was_written(bound: Tensor, version: int) -> bool:
    """Whether a bound tensor changed since its version was ``version``; forgets what was exposed."""
    before = bound.__dict__.pop(_CHECKSUM, None)
    return bound._version != version or (before is not None and before != _checksum(bound))


def _expose(bound: Tensor) -> None:
    if _CHECKSUM not in bound.__dict__:
        bound.__dict__[_CHECKSUM] = _checksum(bound)


def _checksum(bound: Tensor) -> int:
    raw = _RAW.__get__(bound)
    return zlib.crc32(memoryview(raw.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()))
