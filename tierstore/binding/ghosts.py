"""Stand-ins for tensors whose bytes rest in another tier.

A ghost has the true shape, dtype, strides and device and no bytes. Views of a ghost are ghosts and
move nothing. Any other operation borrows the bytes for its own duration and computes with plain
tensors, so its numbers are those of the plain module; what it writes is given to the home. Results
that alias a borrowed slot come out as ghosts again, so no alias outlives its loan.

Interception is at the dispatcher (``__torch_dispatch__``), below autograd: torch's Python code sees
no override and takes the same paths as with plain tensors, and the graph saves ghosts, not slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from tierstore.binding.slot import Slot
from tierstore.errors import ModuleError

_KEY = "_tierstore_view"
_STATISTICS = ("running_mean", "running_var")


class Home(Protocol):
    """Where ghosts get their bytes."""

    def loan(self, blocks: Sequence[str], *, written: Sequence[str]) -> AbstractContextManager[Mapping[str, Slot]]:
        """Hold ``blocks`` in memory inside the ``with``; at its end the ``written`` ones are kept."""
        ...

    def lookup(self, block: str, meta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor] | None:
        """Only the rows of a 2-D block that ``indices`` name, and the indices into those rows; or None."""
        ...


class View:
    """Which bytes a ghost stands for: a block, seen through the meta tensor ``meta``."""

    __slots__ = ("block", "device", "home", "meta")

    def __init__(self, home: Home, block: str, meta: Tensor, device: torch.device) -> None:
        self.home = home
        self.block = block
        self.meta = meta
        self.device = device


def view_of(tensor: Tensor) -> View | None:
    """The view behind a ghost; None for any other tensor."""
    if isinstance(tensor, GhostTensor | GhostParameter):
        return cast(View, tensor.__dict__[_KEY])
    return None


def _wrap(cls: type[Tensor], view: View, requires_grad: bool) -> Any:
    meta = view.meta
    ghost = cast(Any, Tensor)._make_wrapper_subclass(
        cls,
        meta.size(),
        strides=meta.stride(),
        storage_offset=meta.storage_offset(),
        dtype=meta.dtype,
        device=view.device,
        requires_grad=requires_grad,
    )
    ghost.__dict__[_KEY] = view
    return ghost


class _Reading:
    """What Python asks of a tensor past the dispatcher. Each gives true values or a clear error."""

    __torch_function__ = cast(Any, torch._C)._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    @property
    def data(self: Any) -> Tensor:
        return cast(Tensor, self.detach())

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        same = value.shape == self.shape and value.dtype == self.dtype and value.device == self.device
        if not same:
            raise ModuleError(
                f"a weight of shape {tuple(self.shape)} and dtype {self.dtype} on {self.device} is offloaded "
                f"and cannot become {tuple(value.shape)}, {value.dtype} on {value.device}: close the session, change "
                f"the module, and offload it again"
            )
        if value is not self:
            self.detach().copy_(value)

    def tolist(self: Any) -> Any:
        return read(self).tolist()

    def numpy(self: Any, *, force: bool = False) -> Any:
        """A read-only copy: writes through numpy could not be seen."""
        array = read(self, attached=True).numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self: Any, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.numpy(), dtype=dtype)

    def __dlpack__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return read(self).__dlpack__(*args, **kwargs)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _plain(self)
        return memo[id(self)]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return cast(Any, _plain(self)).__reduce_ex__(protocol)

    def __repr__(self: Any, *, tensor_contents: Any = None) -> str:
        return repr(_plain(self))

    def data_ptr(self: Any) -> int:
        raise _no_memory("data_ptr()", self)

    def untyped_storage(self: Any) -> torch.UntypedStorage:
        raise _no_memory("untyped_storage()", self)

    def storage(self: Any) -> Any:
        raise _no_memory("storage()", self)

    def share_memory_(self: Any) -> Any:
        raise _no_memory("share_memory_()", self)


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


def read(ghost: Tensor, *, attached: bool = False) -> Tensor:
    """A plain copy of a ghost's values, with the same strides where that is possible."""
    if attached and ghost.requires_grad:
        return ghost.clone()
    with torch.no_grad():
        return ghost.detach().clone(memory_format=torch.preserve_format)


def _plain(ghost: Tensor) -> Tensor:
    copy = read(ghost)
    if isinstance(ghost, nn.Parameter):
        return nn.Parameter(copy, ghost.requires_grad)
    return copy.requires_grad_(ghost.requires_grad)


def _no_memory(what: str, ghost: Tensor) -> ModuleError:
    return ModuleError(
        f"{what} of an offloaded tensor of shape {tuple(ghost.shape)}: its bytes have no address while they rest in "
        f"another tier; take .clone() for a copy in memory, or close the session first"
    )


class _Signature:
    """What an operation's schema says about aliasing, looked up once per operation."""

    __slots__ = ("may_view", "written_keywords", "written_positions")

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.may_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        self.written_positions: list[int] = []
        self.written_keywords: set[str] = set()
        for position, argument in enumerate(schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            # torch's schemas do not say that batch_norm and instance_norm write their statistics
            if written or argument.name in _STATISTICS:
                self.written_positions.append(position)
                self.written_keywords.add(argument.name)


@lru_cache(maxsize=4096)
def _signature(func: Any) -> _Signature:
    return _Signature(func)


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        items = [_map(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return value


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    signature = _signature(func)
    if signature.may_view:
        viewed = _as_view(func, args, kwargs)
        if viewed is not None:
            return viewed
    if func is torch.ops.aten.embedding.default:
        looked_up = _look_up(func, args, kwargs)
        if looked_up is not None:
            return looked_up
    return _compute(func, signature, args, kwargs)


def _as_view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result as ghosts when it is a pure view of ghosts, worked out on meta tensors; else None."""
    sources: dict[int, View] = {}

    def to_meta(tensor: Tensor) -> Tensor:
        view = view_of(tensor)
        if view is None:
            return tensor
        sources[view.meta.untyped_storage()._cdata] = view
        return view.meta

    try:
        out = func(*_map(args, to_meta), **_map(kwargs, to_meta))
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return None  # computed for real, where the same error comes out if it is one
    plain = False

    def to_ghost(tensor: Tensor) -> Any:
        nonlocal plain
        view = sources.get(tensor.untyped_storage()._cdata)
        if view is None:
            plain = True
            return tensor
        return GhostTensor(View(view.home, view.block, tensor, view.device))

    ghosts = _map(out, to_ghost)
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


def _compute(func: Any, signature: _Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    views: dict[int, tuple[Tensor, View]] = {}

    def collect(tensor: Tensor) -> Tensor:
        view = view_of(tensor)
        if view is not None:
            views[id(tensor)] = (tensor, view)
        return tensor

    _map((args, kwargs), collect)
    written: list[str] = []

    def note_written(tensor: Tensor) -> Tensor:
        view = view_of(tensor)
        if view is not None:
            written.append(view.block)
        return tensor

    for position in signature.written_positions:
        if position < len(args):
            _map(args[position], note_written)
    for keyword in signature.written_keywords:
        if keyword in kwargs:
            _map(kwargs[keyword], note_written)

    if not views:  # a subclass reached us with no ghost among its arguments
        return func(*args, **kwargs)
    home = next(iter(views.values()))[1].home
    blocks = list(dict.fromkeys(view.block for _, view in views.values()))
    with home.loan(blocks, written=written) as slots:
        lent = {key: slots[view.block].tensor(view.block, view.meta) for key, (_, view) in views.items()}
        owners = {id(lent[key]): tensor for key, (tensor, _) in views.items()}
        out = func(*_map(args, lambda t: lent.get(id(t), t)), **_map(kwargs, lambda t: lent.get(id(t), t)))
        loans = {slots[view.block].key: (slots[view.block], view) for _, view in views.values()}

        def hide(tensor: Tensor) -> Any:
            if id(tensor) in owners:
                return owners[id(tensor)]
            if tensor.layout is not torch.strided or tensor.device.type == "meta":
                return tensor
            loan = loans.get(tensor.untyped_storage()._cdata) if type(tensor) is Tensor else None
            return tensor if loan is None else _ghost_of_alias(tensor, blocks, views, slots)

        return _map(out, hide)


def _ghost_of_alias(
    tensor: Tensor, blocks: list[str], views: dict[int, tuple[Tensor, View]], slots: Mapping[str, Slot]
) -> GhostTensor:
    """A ghost for ``tensor``, a view of a lent slot: the block whose bytes it starts in."""
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()._cdata
    near = [b for b in blocks if slots[b].key == storage and slots[b].offsets[b] <= start]
    block = max(near, key=lambda b: slots[b].offsets[b])
    view = next(v for _, v in views.values() if v.block == block)
    meta = torch.empty(0, dtype=tensor.dtype, device="meta").set_(
        cast(Any, view.meta.untyped_storage()),
        (start - slots[block].offsets[block]) // tensor.itemsize,
        tensor.size(),
        tensor.stride(),
    )
    return GhostTensor(View(view.home, block, meta, view.device))
