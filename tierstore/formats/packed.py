"""A weight that stands packed in memory and behaves as a tensor of the values that its format kept.

``F.linear`` and ``F.embedding`` compute with the parts themselves. Views of a packed tensor are packed tensors. All
else sees the values, unpacked for the time of the operation. Nothing can write to it, and it takes no gradient; those
of what it is multiplied with are right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tierstore.errors import ModuleError
from tierstore.formats.format import Format, Parts
from tierstore.formats.lent import multiply
from tierstore.formats.packed_operations import linear_fits, operate, refuse_writing
from tierstore.formats.packed_views import KEY, Packed, PackedView, Packing, packed_view_of, whole_view
from tierstore.formats.scratch import Scratch
from tierstore.formats.unaddressed import Unaddressed

_IS_PARAMETER = "_is_param"  # torch's own mark of parameters that are of another class than nn.Parameter


def packed_parameter(
    form: Format,
    parts: Parts,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scratch: Scratch,
    *,
    device: torch.device | None = None,
    unseen: bool = False,
) -> nn.Parameter:
    """A ``PackedTensor`` that is a parameter, of ``shape`` and ``dtype``, over ``parts`` that ``form`` gave for it.

    They may be on meta. ``device`` is where it seems to be and its parts will be: by default, where they are.
    ``unseen`` is for modules whose Python code takes another path where a tensor overrides functions, such as
    ``nn.MultiheadAttention``: it is met at the dispatcher only.
    """
    where = device or next(iter(parts.values())).device
    made = (UnseenPackedTensor if unseen else PackedTensor)(
        parts, whole_view(Packing.of(form, tuple(shape), dtype, scratch), where)
    )
    made.__dict__[_IS_PARAMETER] = True
    return cast(nn.Parameter, made)


def _wrapper(cls: type[Tensor], view: PackedView) -> Any:
    meta = view.meta
    return cast(Any, Tensor)._make_wrapper_subclass(
        cls,
        meta.size(),
        strides=meta.stride(),
        storage_offset=meta.storage_offset(),
        dtype=meta.dtype,
        device=view.device,
    )


class PackedTensor(Packed, Unaddressed, Tensor):
    """``parts`` as ``view`` shows them. A parameter of a module, if so marked, or a view of one."""

    @staticmethod
    def __new__(cls, parts: Parts, view: PackedView) -> PackedTensor:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # as a view of a plain weight is a plain tensor there too
                made = _wrapper(cls, view)
        else:
            made = _wrapper(cls, view)
        held = made.__dict__
        for name in view.packing.names:
            held[name] = parts[name]
        held[KEY] = view
        return cast(PackedTensor, made)

    def __init__(self, parts: Parts, view: PackedView) -> None:
        """All is done in ``__new__``: a tensor's metadata is fixed when it is made."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = _OWN.get(func)
        if own is not None:
            done = own(*args, **(kwargs or {}))
            if done is not NotImplemented:
                return done
        with cast(Any, torch._C).DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stubs are narrower than torch
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return operate(func, args, kwargs or {}, cls)

    def __tensor_flatten__(self: Any) -> tuple[list[str], PackedView]:
        view = self.__dict__[KEY]
        return list(view.packing.names), view

    @staticmethod
    def __tensor_unflatten__(inner: Parts, view: PackedView, size: Any, stride: Any) -> PackedTensor:
        return PackedTensor(inner, view)

    @property
    def form(self: Any) -> Format:
        """The format of the parts."""
        return cast(PackedView, self.__dict__[KEY]).packing.form

    @property
    def parts(self: Any) -> dict[str, Tensor]:
        """The parts of the whole tensor, by name."""
        return {name: self.__dict__[name] for name in self.__dict__[KEY].packing.names}

    @property
    def data(self: Any) -> Tensor:
        return cast(Tensor, self.detach())

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        if value is not self:
            refuse_writing(self, "giving .data another tensor")

    @property
    def requires_grad(self: Any) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self: Any, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self: Any, requires_grad: bool = True) -> Any:
        if requires_grad:
            refuse_writing(self, "training")
        return self

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        """A packed tensor with parts of its own."""
        if id(self) not in memo:
            view: PackedView = self.__dict__[KEY]
            scratch = memo.setdefault(id(view.packing.scratch), Scratch())
            parts = {name: copy.deepcopy(part, memo) for name, part in self.parts.items()}
            memo[id(self)] = twin = type(self)(parts, view.of(replace(view.packing, scratch=scratch)))
            others = {name: value for name, value in self.__dict__.items() if name not in twin.__dict__}
            twin.__dict__.update(copy.deepcopy(others, memo))
        return memo[id(self)]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """As a plain tensor of the values, that anyone can load."""
        values: Any = read(self)
        plain = nn.Parameter(values, requires_grad=False) if isinstance(self, nn.Parameter) else values
        return plain.__reduce_ex__(protocol)

    def __repr__(self: Any, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as above
        view: PackedView = self.__dict__[KEY]
        return (
            f"PackedTensor({view.packing.form.name}, shape={tuple(view.meta.shape)}, "
            f"dtype={view.meta.dtype}, device={str(view.device)!r})"
        )

    def _copied(self: Any, *, attached: bool = False) -> Tensor:
        return read(self)  # it never is

    def _no_address(self: Any, what: str) -> ModuleError:
        return ModuleError(
            f"{what} of a packed tensor of shape {tuple(self.shape)}: its values have no address; take .clone() for a "
            f"plain copy, or the address of one of its .parts"
        )


class UnseenPackedTensor(PackedTensor):
    """One that torch's Python code takes for a plain tensor."""

    __torch_function__ = cast(Any, torch._C)._disabled_torch_function_impl


def attributes_of(packed: Tensor) -> tuple[str, ...]:
    """The names in its ``__dict__`` that make it what it is; the others are its user's."""
    own = (*cast(PackedView, packed.__dict__[KEY]).packing.names, KEY, _IS_PARAMETER)
    return tuple(name for name in own if name in packed.__dict__)


def read(tensor: Tensor) -> Tensor:
    """A plain copy of the values."""
    with torch.no_grad():
        return tensor.clone()


# ---- what is computed from the parts before torch takes it apart


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    view = packed_view_of(weight)
    if view is None or not view.straight or isinstance(input, Packed) or _is_transformed(input):
        return NotImplemented
    attached = torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))
    if attached or torch.is_autocast_enabled(view.device.type):
        return _linear_of_others(input, weight, view, bias, attached)
    return multiply(input, weight, view, bias) if linear_fits(input, view, bias, view.meta.dtype) else NotImplemented


def _linear_of_others(input: Any, weight: Any, view: PackedView, bias: Any, attached: bool) -> Any:
    """For a graph, and in the dtype that autocast wants."""
    dtype = view.meta.dtype
    if torch.is_autocast_enabled(view.device.type) and input.is_floating_point():
        if torch.float64 in (dtype, input.dtype):
            return NotImplemented
        dtype = torch.get_autocast_dtype(view.device.type)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    if not linear_fits(input, view, bias, dtype):
        return NotImplemented
    with cast(Any, torch._C)._DisableAutocast(), cast(Any, torch._C).DisableTorchFunctionSubclass():
        if not attached:
            return multiply(input, weight, view, bias)
        if dtype is not view.meta.dtype:
            weight = PackedTensor(weight.__dict__, view.of(replace(view.packing, dtype=dtype)))
        # as a matrix, so that the graph is that of one product and saves the packed weight
        product = F.linear(input.reshape(-1, input.size(-1)), weight, bias)
        return product.view(*input.shape[:-1], product.size(-1))


def _is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation looks on: they know torch's own operations only."""
    wrapped: bool = cast(Any, torch._C)._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or cast(Any, forward_ad)._current_level >= 0


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *_: Any,
    **__: Any,
) -> Any:
    """With ``max_norm``, torch scales the rows in the table; here their copies are."""
    if max_norm is None or not isinstance(weight, Packed):
        return NotImplemented
    rows, numbers = _rows(weight, input)
    return F.embedding(numbers, rows, None, max_norm, norm_type)


def _embedding_bag(input: Tensor, weight: Tensor, *rest: Any, padding_idx: int | None = None, **how: Any) -> Any:
    if padding_idx is not None or not isinstance(weight, Packed) or input.is_floating_point():
        return NotImplemented
    rows, numbers = _rows(weight, input)
    return F.embedding_bag(numbers, rows, *rest, **how)


def _rows(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that ``indices`` name, one after the other, and their numbers there in the places of the indices."""
    rows = F.embedding(indices.reshape(-1), table)
    return rows, torch.arange(rows.size(0), device=rows.device).view(indices.shape)


_OWN: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}
