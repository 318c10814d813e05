"""Tensors over a slot that stand in a module during its unit's turn, where they cost nothing."""

from __future__ import annotations

import zlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from tierstore.errors import ModuleError

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
        if value.shape != self.shape or value.dtype != self.dtype or value.device != self.device:
            raise ModuleError(
                f"an offloaded weight of shape {tuple(self.shape)} and dtype {self.dtype} on {self.device} cannot "
                f"become {tuple(value.shape)}, {value.dtype} on {value.device} inside forward: close the session first"
            )
        _expose(self)
        _RAW.__get__(self).copy_(value)

    def numpy(self: Any, *, force: bool = False) -> Any:
        _expose(self)
        return Tensor.numpy(self, force=force)

    def __array__(self: Any, *args: Any, **kwargs: Any) -> Any:
        _expose(self)
        return cast(Any, Tensor).__array__(self, *args, **kwargs)


class BoundParameter(_Exposing, nn.Parameter):
    """A parameter over a slot."""


class BoundTensor(_Exposing, Tensor):
    """A buffer over a slot."""


def bind(view: Tensor, ghost: Tensor) -> Tensor:
    """``view``, a plain view of a slot, in the role of ``ghost`` and sharing its attributes."""
    bound: Tensor
    if isinstance(ghost, nn.Parameter):
        bound = BoundParameter(view, ghost.requires_grad)
    else:
        bound = view.as_subclass(BoundTensor)
    bound.__dict__ = ghost.__dict__
    return bound


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
