"""Every tensor of a module: what it is, where it is held, and which bytes it shares with others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in __all__
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tierstore.binding.views import Ghost
from tierstore.errors import ModuleError
from tierstore.tensors import ITEMSIZE

PHASE = 64  # torch aligns fresh CPU tensors to 64 bytes; float32 matmuls differ in the last bit elsewhere


@dataclass(frozen=True)
class Location:
    """One place that holds a tensor: ``container[key]`` is it."""

    container: MutableMapping[Any, Any] | MutableSequence[Any]
    key: Any
    owner: nn.Module


@dataclass
class Entry:
    """One tensor object of a module, under its first name, and all the places that hold it."""

    name: str
    tensor: Tensor
    locations: list[Location] = field(default_factory=list)
    stays: str = ""
    """Why the tensor cannot leave memory; empty when it can."""
    part_of: str = ""
    """The name of the wrapper subclass that the tensor is a part of; empty when it stands for itself."""


@dataclass(frozen=True)
class Span:
    """Bytes ``[start, end)`` of one storage that tensors cover, ``phase`` bytes after an aligned address."""

    name: str
    start: int
    end: int
    phase: int
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the block, the phase's padding in front included."""
        return self.phase + self.end - self.start

    def meta(self, entry: Entry, storage: torch.UntypedStorage) -> Tensor:
        """The entry's view of the block, over the block's meta storage."""
        tensor = entry.tensor
        first = tensor.storage_offset() * tensor.itemsize - self.start + self.phase
        empty = torch.empty(0, dtype=tensor.dtype, device="meta")
        return empty.set_(cast(Any, storage), first // tensor.itemsize, tensor.size(), tensor.stride())

    def read(self) -> Tensor:
        """The block's bytes, 1-D uint8: in place, or copied where the phase needs padding."""
        source = torch.empty(0, dtype=torch.uint8, device=self.entries[0].tensor.device).set_(
            cast(Any, self.entries[0].tensor.untyped_storage()), self.start, (self.end - self.start,), (1,)
        )
        return source if not self.phase else torch.cat([source.new_zeros(self.phase), source])


def find_entries(root: nn.Module, *, elsewhere: Collection[str] = ()) -> list[Entry]:
    """Every distinct parameter and buffer below ``root``, in registration order.

    Tensors on meta must be named in ``elsewhere``: their values are in a store. Wrapper subclasses are
    followed to the plain tensors inside them. Raises ``ModuleError`` for tensors without values (meta,
    uninitialized).
    """
    entries: dict[int, Entry] = {}
    for module_name, module in root.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        for holder in (module._parameters, module._buffers):
            for key in list(holder.keys()):
                tensor = holder[key]
                if tensor is not None:
                    name = f"{module_name}.{key}" if module_name else key
                    reason = "it belongs to a ScriptModule" if scripted else ""
                    if tensor.device.type == "meta" and id(tensor) not in entries and name not in elsewhere:
                        raise ModuleError(
                            f"{name} is on the meta device and has no values: load it first, or use tierstore.load"
                        )
                    _add(entries, name, tensor, Location(cast(Any, holder), key, module), reason)
    storages = {_storage(entry.tensor) for entry in entries.values() if entry.tensor.device.type != "meta"} - {0}
    for module_name, module in root.named_modules():
        for location, tensor in _held_in_attributes(module):
            if id(tensor) in entries:
                entries[id(tensor)].locations.append(location)
            elif _storage(tensor) in storages:  # a view of a weight that the module keeps for itself
                _add(entries, f"{module_name}.({location.key})".lstrip("."), tensor, location, "")
    return list(entries.values())


def _storage(tensor: Tensor) -> int:
    """Which memory a plain tensor has; 0 for others."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return int(tensor.untyped_storage()._cdata) if plain else 0


def _add(
    entries: dict[int, Entry], name: str, tensor: Tensor, location: Location, reason: str, part_of: str = ""
) -> None:
    if _is_wrapper(tensor):
        inner_names, _ = cast(Any, tensor).__tensor_flatten__()
        for inner in inner_names:
            if inner not in tensor.__dict__:
                reason = reason or f"its class {type(tensor).__name__} does not hold {inner!r} as a plain attribute"
        if not reason:
            for inner in inner_names:
                held = Location(tensor.__dict__, inner, location.owner)
                _add(entries, f"{name}.{inner}", tensor.__dict__[inner], held, reason, part_of or name)
            return
    entry = entries.get(id(tensor))
    if entry is None:
        entry = entries[id(tensor)] = Entry(name, tensor, stays=reason or _why_it_stays(name, tensor), part_of=part_of)
    entry.locations.append(location)


def _is_wrapper(tensor: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def _held_in_attributes(module: nn.Module) -> Iterator[tuple[Location, Tensor]]:
    """Tensors that are a module's plain attributes, or in lists and dicts that are (an RNN's ``_flat_weights``)."""
    for name, value in list(module.__dict__.items()):
        pairs: list[tuple[Any, Any]] = []
        container: Any = value
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, Tensor):
            container, pairs = module.__dict__, [(name, value)]
        elif type(value) is list:
            pairs = list(enumerate(value))
        elif type(value) is dict:
            pairs = list(value.items())
        for key, item in pairs:
            if isinstance(item, Tensor):
                yield Location(container, key, module), item


def _why_it_stays(name: str, tensor: Tensor) -> str:
    if isinstance(tensor, Ghost):
        raise ModuleError(f"{name} is offloaded by another session already: close that one first")
    if isinstance(tensor, UninitializedTensorMixin):
        raise ModuleError(f"{name} is not initialized yet: run the lazy module once, then offload it")
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.is_quantized:
        return f"its dtype is {tensor.dtype}"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"its class is {type(tensor).__name__}"
    if tensor.is_inference():
        return "it was made in inference mode"
    if tensor.is_conj() or tensor.is_neg():
        return "it is a lazily conjugated or negated view"
    if not tensor.is_leaf:
        return "it is not a leaf of the autograd graph"
    if tensor.numel() == 0:
        return "it is empty"
    if str(tensor.dtype).removeprefix("torch.") not in ITEMSIZE:
        return f"its dtype is {tensor.dtype}"
    if cast(Any, tensor)._use_count() > 1:
        return "an autograd graph still holds it"
    return ""


def find_spans(entries: list[Entry], *, in_place: bool) -> list[Span]:
    """The blocks of the movable entries: tensors whose bytes overlap within a storage share one.

    Where weights are computed with ``in_place``, each keeps its address modulo 64, for the same bits. A copy on
    another device lands aligned, as torch's own copy would.
    """
    by_storage: dict[int, list[tuple[int, int, Entry]]] = {}
    fixed: set[int] = set()
    for entry in entries:
        if not entry.stays:
            start, end = _covered(entry.tensor)
            by_storage.setdefault(entry.tensor.untyped_storage()._cdata, []).append((start, end, entry))
        elif entry.tensor.layout is torch.strided and type(entry.tensor) in (Tensor, nn.Parameter):
            fixed.add(entry.tensor.untyped_storage()._cdata)
    for storage in fixed & by_storage.keys():
        for _, _, entry in by_storage.pop(storage):
            entry.stays = "it shares memory with a tensor that stays"
    order = {id(entry): position for position, entry in enumerate(entries)}
    spans: list[tuple[int, Span]] = []
    for covered in by_storage.values():
        covered.sort(key=lambda item: item[:2])
        group = [covered[0]]
        groups = [group]
        reach = covered[0][1]
        for item in covered[1:]:
            if item[0] < reach:
                group.append(item)
            else:
                group = [item]
                groups.append(group)
            reach = max(reach, item[1])
        for members in groups:
            start, end = members[0][0], max(m[1] for m in members)
            address = members[0][2].tensor.untyped_storage().data_ptr() + start
            held = sorted((m[2] for m in members), key=lambda e: order[id(e)])
            phase = address % (PHASE if in_place else max(m[2].tensor.itemsize for m in members))
            spans.append((order[id(held[0])], Span(held[0].name, start, end, phase, tuple(held))))
    return [span for _, span in sorted(spans, key=lambda item: item[0])]


def _covered(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a strided tensor touches, as ``[start, end)``."""
    last = sum((int(size) - 1) * int(step) for size, step in zip(tensor.size(), tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + (last + 1) * tensor.itemsize
