"""Stand-ins for tensors whose bytes rest in another tier.

A ghost has the true shape, dtype, strides and device and no bytes. Views of a ghost are ghosts and
move nothing. Any other operation borrows the bytes for its own duration and computes with plain
tensors, so its numbers are those of the plain module; what it writes is given to the home. Results
that alias a borrowed slot come out as ghosts again, so no alias outlives its loan.

Interception is at the dispatcher (``__torch_dispatch__``), below autograd: torch's Python code sees
no override and takes the same paths as with plain tensors, and the graph saves ghosts, not slots.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from tierstore.binding.operations import operate
from tierstore.binding.views import KEY, Ghost, View
from tierstore.errors import ModuleError
from tierstore.formats.unaddressed import Unaddressed


def _wrap(cls: type[Tensor], view: View, requires_grad: bool) -> Any:
    meta = view.meta
    with torch.inference_mode(False):  # as a view of a plain weight is a plain tensor there too
        ghost = cast(Any, Tensor)._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=view.device,
            requires_grad=requires_grad,
        )
    ghost.__dict__[KEY] = view
    return ghost


class _Reading(Ghost, Unaddressed):
    """What Python asks of a tensor past the dispatcher. Each gives true values or a clear error."""

    __torch_function__ = cast(Any, torch._C)._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return operate(func, args, kwargs or {}, GhostTensor)

    @property
    def data(self: Any) -> Tensor:
        return cast(Tensor, self.detach())

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        if value is self:
            return
        check_replacement(self, value)
        self.detach().copy_(value)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = plain_copy(self, memo)
        return memo[id(self)]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        plain = plain_copy(self)
        plain.__dict__.update(_attributes(self))
        return cast(Any, plain).__reduce_ex__(protocol)

    def __repr__(self: Any, *, tensor_contents: Any = None) -> str:
        return repr(plain_copy(self))

    def _copied(self: Any, *, attached: bool = False) -> Tensor:
        return read(self, attached=attached)

    def _no_address(self: Any, what: str) -> ModuleError:
        return ModuleError(
            f"{what} of an offloaded tensor of shape {tuple(self.shape)}: its bytes have no address while they rest in "
            f"another tier; take .clone() for a copy in memory, or close the session first"
        )


class GhostTensor(_Reading, Tensor):  # type: ignore[misc]  # torch's stubs are narrower than torch
    """A buffer, or a view of any offloaded tensor."""

    @staticmethod
    def __new__(cls, view: View, requires_grad: bool = False) -> GhostTensor:
        return cast(GhostTensor, _wrap(cls, view, requires_grad))

    def __init__(self, view: View, requires_grad: bool = False) -> None:
        """All is done in ``__new__``: a tensor's metadata is fixed when it is made."""


class GhostParameter(_Reading, nn.Parameter):  # type: ignore[misc]  # as above
    """An offloaded parameter."""

    def __new__(cls, view: View, requires_grad: bool = True) -> GhostParameter:
        return cast(GhostParameter, _wrap(cls, view, requires_grad))

    def __init__(self, view: View, requires_grad: bool = True) -> None:
        """All is done in ``__new__``: a tensor's metadata is fixed when it is made."""


def read(tensor: Tensor, *, attached: bool = False) -> Tensor:
    """A plain copy of the values, with the same strides where that is possible."""
    if attached and tensor.requires_grad:
        return tensor.clone()
    with torch.no_grad():
        return tensor.detach().clone(memory_format=torch.preserve_format)


def plain_copy(tensor: Tensor, memo: dict[int, Any] | None = None) -> Tensor:
    """A plain tensor or parameter of the same values; with ``memo`` as ``copy.deepcopy`` makes it."""
    values = read(tensor).as_subclass(Tensor)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, tensor.requires_grad)
    if memo is not None:
        values.__dict__.update(copy.deepcopy(_attributes(tensor), memo))
    return values.requires_grad_(tensor.requires_grad)


def check_replacement(tensor: Tensor, value: Tensor) -> None:
    """Raise unless ``tensor.data = value`` only changes values: an offloaded tensor keeps its form."""
    same = value.shape == tensor.shape and value.dtype == tensor.dtype and value.device == tensor.device
    if not same:
        raise ModuleError(
            f"a weight of shape {tuple(tensor.shape)} and dtype {tensor.dtype} on {tensor.device} is offloaded "
            f"and cannot become {tuple(value.shape)}, {value.dtype} on {value.device}: close the session, change "
            f"the module, and offload it again"
        )


def _attributes(tensor: Tensor) -> dict[str, Any]:
    return {key: value for key, value in tensor.__dict__.items() if key != KEY}
