"""Carries out operations of the dispatcher that have packed tensors among their arguments.

Views of packed tensors are packed tensors and compute nothing. Products and rows are worked out from the parts.
For any other operation the values are unpacked into memory that is used again by the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.formats.dispatched import COMPOSITE, map_tensors, signature_of
from tierstore.formats.format import Parts
from tierstore.formats.lent import multiply, multiply_back, rows_of, values_of
from tierstore.formats.packed_views import Packed, PackedView, packed_view_of

MakePacked = Callable[[Parts, PackedView], Tensor]
"""A packed tensor of parts, as a view shows them."""

aten = torch.ops.aten


def operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], packed: MakePacked) -> Any:
    """The result of ``func``; views of packed tensors are made by ``packed``.

    Raises ``ModuleError`` for operations that write to one.
    """
    special = _SPECIAL.get(func)
    if special is not None:
        done = special(*args, **kwargs)
        if done is not NotImplemented:
            return done
    if func is aten._to_copy.default:
        moved = _moved(*args, **kwargs, packed=packed)
        if moved is not None:
            return moved
    signature = signature_of(func)
    for value in signature.written(args, kwargs):
        refuse_writing(value, str(func))
    if _is_composite(func):  # in inference mode these reach us whole
        return func._op_dk(COMPOSITE, *args, **kwargs)
    if signature.may_view:
        viewed = _as_view(func, args, kwargs, packed)
        if viewed is not NotImplemented:
            return viewed
    return _compute(func, args, kwargs)


def refuse_writing(value: Any, what: str) -> None:
    """Raise if a packed tensor is among ``value``."""

    def refuse(tensor: Tensor) -> Tensor:
        view = packed_view_of(tensor)
        if view is not None:
            raise ModuleError(
                f"{what} would change a weight of shape {view.packing.shape} that is packed as "
                f'{view.packing.form.name}, and what is packed cannot change: choose "keep" for that tensor, as in '
                f'formats={{"<its name>": "keep"}}, or work on a .clone() of it'
            )
        return tensor

    map_tensors(value, refuse)


@lru_cache(maxsize=4096)
def _is_composite(func: Any) -> bool:
    """Whether torch itself takes the operation apart: only then can it be asked to."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE.name))


def _as_view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], packed: MakePacked) -> Any:
    """The result as packed tensors when it is a pure view of a packed one, worked out on a meta tensor."""
    source = args[0] if args else None
    view = packed_view_of(source) if isinstance(source, Tensor) else None
    if source is None or view is None:
        return NotImplemented
    try:
        out = func(view.meta, *args[1:], **kwargs)
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return NotImplemented  # computed for real, where the same error comes out if it is one
    shown = [out] if isinstance(out, Tensor) else out
    storage = view.meta.untyped_storage()._cdata
    if any(meta.untyped_storage()._cdata != storage for meta in shown):
        return NotImplemented
    made = [packed(source.__dict__, PackedView(view.packing, meta, view.device)) for meta in shown]
    return made[0] if isinstance(out, Tensor) else made


def _moved(
    tensor: Tensor,
    *,
    packed: MakePacked,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> Tensor | None:
    """The packed tensor on another device, where nothing else is asked for."""
    view = packed_view_of(tensor)
    if view is None or device in (None, view.device) or dtype not in (None, view.meta.dtype):
        return None
    if memory_format not in (None, torch.preserve_format):
        return None
    held = tensor.__dict__
    there = {name: held[name].to(device, non_blocking=non_blocking) for name in view.packing.names}
    return packed(there, PackedView(view.packing, view.meta, next(iter(there.values())).device))


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result on plain values, none of which it keeps."""
    lent: dict[int, tuple[Tensor, Tensor]] = {}

    def lend(tensor: Tensor) -> Tensor:
        view = packed_view_of(tensor)
        if view is None:
            return tensor
        if id(tensor) not in lent:
            # one operation may use several: each beside the others
            lent[id(tensor)] = tensor, values_of(tensor, view, apart=bool(lent))
        return lent[id(tensor)][1]

    out = func(*map_tensors(args, lend), **map_tensors(kwargs, lend))
    owners = {id(values): tensor for tensor, values in lent.values()}
    storages = {values.untyped_storage()._cdata for _, values in lent.values()}

    def part(tensor: Tensor) -> Tensor:
        if id(tensor) in owners:
            return owners[id(tensor)]
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type == "meta":
            return tensor
        return tensor.clone() if tensor.untyped_storage()._cdata in storages else tensor

    return map_tensors(out, part)


# ---- products and rows


def linear_fits(x: Tensor, view: PackedView, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether ``F.linear`` of ``x``, what ``view`` shows, and ``bias`` is a product of ``dtype`` with one matrix."""
    if not view.straight or not _is_dense(x) or x.dtype is not dtype or not x.dim():
        return False
    if x.size(-1) != view.packing.k:
        return False
    return bias is None or (not isinstance(bias, Packed) and bias.dtype is dtype and bias.shape == (view.packing.n,))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    view = packed_view_of(weight)
    if view is None or not linear_fits(x, view, bias, view.meta.dtype):
        return NotImplemented
    return multiply(x, weight, view, bias)


def _mv(weight: Tensor, x: Tensor) -> Any:
    return _linear(x, weight)


def _mm(x: Tensor, weight: Tensor) -> Any:
    view = packed_view_of(weight)
    return NotImplemented if view is None else _times(x, weight, view)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    view = packed_view_of(weight)
    if view is None or beta != 1 or alpha != 1 or isinstance(bias, Packed) or bias.shape != view.meta.shape[1:]:
        return NotImplemented
    return _times(x, weight, view, bias)


def _bmm(x: Tensor, weights: Tensor) -> Any:
    view = packed_view_of(weights)
    if view is None or not _is_dense(x) or x.dim() != 3 or x.size(0) != view.meta.size(0):
        return NotImplemented
    products = [_times(rows, weights, view.at(number)) for number, rows in enumerate(x)]
    known = bool(products) and not any(product is NotImplemented for product in products)
    return torch.stack(products) if known else NotImplemented


def _grouped_mm(
    x: Tensor, weights: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> Any:
    """Rows ``offs[i - 1]`` up to ``offs[i]`` of x times matrix i."""
    view = packed_view_of(weights)
    if view is None or not _is_dense(x) or x.dim() != 2 or view.meta.dim() != 3 or offs is None:
        return NotImplemented
    if bias is not None or out_dtype not in (None, x.dtype):
        return NotImplemented
    out = x.new_zeros((x.size(0), view.meta.size(2)))
    start = 0
    for number, end in enumerate(offs.tolist()):
        if start < end:
            product = _times(x[start:end], weights, view.at(number))
            if product is NotImplemented:
                return NotImplemented
            out[start:end] = product
            start = end
    return out


def _embedding(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> Any:
    view = packed_view_of(weight)
    if view is None or not view.straight or isinstance(indices, Packed):
        return NotImplemented
    return rows_of(weight, view, indices)


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested and not isinstance(x, Packed)


def _times(x: Tensor, weight: Tensor, view: PackedView, bias: Tensor | None = None) -> Any:
    """x [m, a] times the [a, b] that ``view`` shows of ``weight``, where that lies in one matrix."""
    if not _is_dense(x) or x.dim() != 2 or x.dtype is not view.meta.dtype or view.number is None:
        return NotImplemented
    if view.meta.dim() != 2 or x.size(1) != view.meta.size(0):
        return NotImplemented
    if view.transposed:
        return multiply(x, weight, view, bias)
    product = multiply_back(x, weight, view) if view.straight else x @ values_of(weight, view)
    return product if bias is None else product + bias


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten.mv.default: _mv,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten._grouped_mm.default: _grouped_mm,
    aten.embedding.default: _embedding,
}
