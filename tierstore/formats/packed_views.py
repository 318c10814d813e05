"""What a packed tensor shows of the values in its parts: all of them, or any view that torch can make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tierstore.formats.format import Format, matrices_of

if TYPE_CHECKING:
    from tierstore.formats.scratch import Scratch

KEY = "_tierstore_packed"


class Packed:
    """Marks the classes of packed tensors. Their parts are plain attributes, under their own names."""


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """What all views of one packed tensor have in common: ``shape`` and ``dtype`` are those of the whole tensor."""

    form: Format
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    scratch: Scratch
    front: tuple[int, ...]
    n: int
    k: int

    @staticmethod
    def of(form: Format, shape: tuple[int, ...], dtype: torch.dtype, scratch: Scratch) -> Packing:
        """The packing of a whole tensor."""
        front, n, k = matrices_of(shape)
        return Packing(form, tuple(p.name for p in form.parts(n, k)), shape, dtype, scratch, front, n, k)


class PackedView:
    """A view of the whole tensor, as ``meta`` shows it over the meta storage that all views of it share.

    ``number`` is that of the only matrix it lies in, None where it touches several. ``straight`` and ``transposed``
    tell whether it shows exactly that matrix, as [n, k] or as [k, n].
    """

    __slots__ = ("device", "meta", "number", "packing", "straight", "transposed")

    def __init__(self, packing: Packing, meta: Tensor, device: torch.device) -> None:
        self.packing = packing
        self.meta = meta
        self.device = device
        size, strides, first = meta.size(), meta.stride(), meta.storage_offset()
        n, k = packing.n, packing.k
        area = max(n * k, 1)
        last = first + sum((length - 1) * step for length, step in zip(size, strides, strict=True))
        one = meta.dtype is packing.dtype and 0 not in size and first // area == last // area
        self.number = first // area if one else None
        exactly = one and first % area == 0
        self.straight = exactly and size == (n, k) and strides == (k, 1)
        self.transposed = exactly and size == (k, n) and strides == (1, k)

    def at(self, index: int) -> PackedView:
        """The view without its first axis, at ``index``."""
        return PackedView(self.packing, self.meta.select(0, index), self.device)

    def of(self, packing: Packing) -> PackedView:
        """The same view of a tensor that is packed in another way."""
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.empty(packing.shape, dtype=packing.dtype, device="meta")
            meta = whole.as_strided(self.meta.size(), self.meta.stride(), self.meta.storage_offset())
        return PackedView(packing, meta, self.device)

    def parts_of(self, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        """The parts of the matrix that the view lies in, or all; ``parts`` may hold other things."""
        packing, number = self.packing, self.number
        found = {name: parts[name] for name in packing.names}
        if number is None:
            return found
        for index in _indices(number, packing.front):
            found = {name: part.select(0, index) for name, part in found.items()}
        return found

    def within(self, values: Tensor) -> Tensor:
        """The view, where ``values`` are those of the matrix it lies in, or of the whole tensor; contiguous."""
        if self.straight:
            return values.view(self.meta.size())
        skipped = 0 if self.number is None else self.number * self.packing.n * self.packing.k
        skipped = skipped * values.itemsize // self.meta.itemsize
        at = values.storage_offset() * values.itemsize // self.meta.itemsize + self.meta.storage_offset() - skipped
        empty = torch.empty(0, dtype=self.meta.dtype, device=values.device)
        shown = empty.set_(cast(Any, values.untyped_storage()), at, self.meta.size(), self.meta.stride())
        return cast(Any, torch)._neg_view(shown) if self.meta.is_neg() else shown


def whole_view(packing: Packing, device: torch.device) -> PackedView:
    """All of a tensor, contiguous."""
    with torch.inference_mode(False), torch.no_grad():
        return PackedView(packing, torch.empty(packing.shape, dtype=packing.dtype, device="meta"), device)


def packed_view_of(tensor: Tensor) -> PackedView | None:
    """The view behind a packed tensor; None for any other."""
    return cast(PackedView, tensor.__dict__[KEY]) if isinstance(tensor, Packed) else None


def _indices(number: int, front: tuple[int, ...]) -> list[int]:
    """Along each axis of a stack, those of its matrix of that number."""
    found: list[int] = []
    for length in reversed(front):
        found.insert(0, number % length)
        number //= length
    return found
