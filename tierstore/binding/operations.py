"""Carries out operations that have ghosts among their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from tierstore.binding.slot import Slot
from tierstore.binding.views import View, view_of
from tierstore.errors import ModuleError
from tierstore.formats.dispatched import COMPOSITE, Signature, map_tensors, signature_of

MakeGhost = Callable[[View], Tensor]


def operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ghost: MakeGhost) -> Any:
    """The result of ``func``, an operation of the dispatcher: as ghosts, made by ``ghost``, where it is a view of
    ghosts; otherwise computed with plain tensors over borrowed memory."""
    signature = signature_of(func)
    if signature.may_view:
        viewed = _as_view(func, args, kwargs, ghost)
        if viewed is not None:
            return viewed
    if func is torch.ops.aten.embedding.default:
        looked_up = _look_up(func, args, kwargs)
        if looked_up is not None:
            return looked_up
    return _compute(func, signature, args, kwargs, ghost)


@lru_cache(maxsize=4096)
def _is_composite(func: Any) -> bool:
    """Whether the operation is taken apart into others, by torch or by what was registered in Python."""
    return bool(func.has_kernel_for_dispatch_key(COMPOSITE))


def _ghosts_in(value: Any) -> dict[int, tuple[Tensor, View]]:
    """The ghosts among arguments, by their object's id."""
    found: dict[int, tuple[Tensor, View]] = {}

    def note(tensor: Tensor) -> Tensor:
        view = view_of(tensor)
        if view is not None:
            found[id(tensor)] = (tensor, view)
        return tensor

    map_tensors(value, note)
    return found


def _as_view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ghost: MakeGhost) -> Any:
    """The result as ghosts when it is a pure view of ghosts, worked out on meta tensors; else None."""
    sources: dict[int, View] = {}
    attached = False
    inference = torch.is_inference_mode_enabled()

    def to_meta(tensor: Tensor) -> Tensor:
        view = view_of(tensor)
        if view is None:
            return tensor
        nonlocal attached
        attached = attached or tensor.requires_grad or view.attached
        sources[view.meta.untyped_storage()._cdata] = view
        return view.meta

    try:
        out = func(*map_tensors(args, to_meta), **map_tensors(kwargs, to_meta))
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return None  # computed for real, where the same error comes out if it is one
    plain = False

    def to_ghost(tensor: Tensor) -> Any:
        nonlocal plain
        view = sources.get(tensor.untyped_storage()._cdata)
        if view is None:
            plain = True
            return tensor
        return ghost(View(view.home, view.block, tensor, view.device, inference and attached))

    ghosts = map_tensors(out, to_ghost)
    return None if plain else ghosts


def _look_up(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    view = view_of(args[0]) if isinstance(args[0], Tensor) else None
    if view is None or not isinstance(args[1], Tensor) or view_of(args[1]) is not None:
        return None
    found = view.home.lookup(view.block, view.meta, args[1])
    if found is None:
        return None
    rows, indices = found
    return func(rows, indices)


def _compute(func: Any, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], ghost: MakeGhost) -> Any:
    found = _ghosts_in((args, kwargs))
    if not found:  # a subclass reached us with no ghost among its arguments
        return func(*args, **kwargs)
    home = next(iter(found.values()))[1].home
    blocks = list(dict.fromkeys(view.block for _, view in found.values()))
    changed = _ghosts_in(signature.written(args, kwargs))
    written = [view.block for _, view in changed.values()]
    with home.loan(blocks, written=written) as slots:
        lent = {
            key: _lend(slots[view.block], view, tensor.requires_grad or view.attached)
            for key, (tensor, view) in found.items()
        }
        owners = {id(lent[key]): tensor for key, (tensor, _) in found.items()}
        # in inference mode compositions of operations reach us whole, and their parts look at what autograd sets
        whole = _is_composite(func) and torch.is_inference_mode_enabled()
        with enable_reentrant_dispatch() if whole else nullcontext():
            out = func(
                *map_tensors(args, lambda t: lent.get(id(t), t)), **map_tensors(kwargs, lambda t: lent.get(id(t), t))
            )
        for key, (_, view) in changed.items():
            _refuse_another_shape(func, lent[key], slots[view.block], view)
        storages = {slots[block].key for block in blocks}

        def hide(tensor: Tensor) -> Any:
            if id(tensor) in owners:
                return owners[id(tensor)]
            if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type == "meta":
                return tensor
            if tensor.untyped_storage()._cdata not in storages:
                return tensor
            return ghost(_view_of_alias(tensor, blocks, [view for _, view in found.values()], slots))

        return map_tensors(out, hide)


def _lend(slot: Slot, view: View, requires_grad: bool) -> Tensor:
    """A plain weight: some operations take another path by its flags, though no graph is recorded here."""
    if not torch.is_inference_mode_enabled():
        tensor = slot.tensor(view.block, view.meta)
    else:
        with torch.inference_mode(False), torch.no_grad():
            tensor = slot.tensor(view.block, view.meta)
    return tensor.requires_grad_() if requires_grad else tensor


def _refuse_another_shape(func: Any, lent: Tensor, slot: Slot, view: View) -> None:
    """Raise when an operation gave a lent tensor other memory, or looks at it in another way: a ghost cannot follow."""
    fresh = slot.tensor(view.block, view.meta)
    same = (
        lent.untyped_storage()._cdata == slot.key
        and lent.shape == fresh.shape
        and lent.stride() == fresh.stride()
        and lent.storage_offset() == fresh.storage_offset()
    )
    if not same:
        raise ModuleError(
            f"{func} changes the shape, the strides or the memory of an offloaded tensor of shape "
            f"{tuple(view.meta.shape)}, which it keeps while it is offloaded: close the session first, or work on a "
            f".clone() of it"
        )


def _view_of_alias(tensor: Tensor, blocks: list[str], views: list[View], slots: Mapping[str, Slot]) -> View:
    """What ``tensor``, a view of a lent slot, shows: the block whose bytes it starts in."""
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()._cdata
    near = [b for b in blocks if slots[b].key == storage and slots[b].offsets[b] <= start]
    block = max(near, key=lambda b: slots[b].offsets[b])
    view = next(v for v in views if v.block == block)
    with torch.inference_mode(False), torch.no_grad():
        meta = torch.empty(0, dtype=tensor.dtype, device="meta").set_(
            cast(Any, view.meta.untyped_storage()),
            (start - slots[block].offsets[block]) // tensor.itemsize,
            tensor.size(),
            tensor.stride(),
        )
        if tensor.is_conj():
            meta = meta.conj()
        if tensor.is_neg():
            meta = cast(Tensor, cast(Any, torch)._neg_view(meta))
    return View(view.home, block, meta, view.device)
