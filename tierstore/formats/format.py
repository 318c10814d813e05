"""What every format of packed weights has in common: names, parts, and how a tensor is seen as matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from tierstore.tensors import TensorSpec

MATRIX_FROM = 32
"""A last axis of at least this many elements is the input axis of a matrix; a shorter one (a convolution's) is not."""

Parts = Mapping[str, Tensor]
"""A packed matrix: tensors by part name, such as ``codes`` and ``scales``. With axes in front, a stack of them."""


class Format(Protocol):
    """How matrices of ``n`` output by ``k`` input features are packed. Immutable and without state."""

    @property
    def name(self) -> str:
        """As users write it, such as ``"int4"``."""
        ...

    @property
    def group(self) -> int:
        """Neighbouring input features that share a scale; 0 where all of a row do."""
        ...

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        """The parts of one matrix, each of at least two axes, in the order they are stored."""
        ...

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parts of ``matrix``, a floating [n, k] on any device, on the same device. Deterministic.

        Needs memory for the parts and a few tiles. Raises ``ModuleError`` for values that are not finite."""
        ...

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``[start, stop)`` as float32 [stop - start, k]: the plain statement of what the parts mean."""
        ...


def matrices_of(shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """``(front, n, k)``: a tensor of ``shape`` is ``front`` many matrices of ``n`` x ``k``, in the order of its memory.

    A short last axis is joined with those before it: a convolution's [out, in, 3, 3] is one matrix [out, in * 9].
    """
    if len(shape) > 2 and shape[-1] >= MATRIX_FROM:
        return tuple(shape[:-2]), shape[-2], shape[-1]
    return (), shape[0], prod(shape[1:])


def part_specs(form: Format, shape: Sequence[int]) -> tuple[TensorSpec, ...]:
    """The parts of a whole tensor of ``shape``: those of its matrices, stacked."""
    front, n, k = matrices_of(shape)
    return tuple(TensorSpec(part.name, part.dtype, (*front, *part.shape)) for part in form.parts(n, k))


def pack_tensor(form: Format, tensor: Tensor) -> dict[str, Tensor]:
    """The parts of a whole tensor, one matrix at a time."""
    return pack_matrices(form, tensor, lambda number, matrix: form.pack(matrix))


def pack_matrices(form: Format, tensor: Tensor, pack: Callable[[int, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of a whole tensor; ``pack`` gives those of each of its matrices, which it is told the number of."""
    front, n, k = matrices_of(tensor.shape)
    if not front:
        return pack(0, tensor.reshape(n, k))
    made = {
        part.name: tensor.new_empty(part.shape, dtype=getattr(torch, part.dtype))
        for part in part_specs(form, tensor.shape)
    }
    flat = tensor.reshape(prod(front), n, k)
    for number, (matrix, place) in enumerate(zip(flat, matrices_in(made, front), strict=True)):
        for name, part in pack(number, matrix).items():
            place[name].copy_(part)
    return made


def matrices_in(parts: Parts, front: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """The parts of each matrix of a stack with ``front`` axes, as views, in the order of its memory."""
    flat = {name: part.flatten(0, len(front) - 1) if front else part[None] for name, part in parts.items()}
    for number in range(prod(front)):
        yield {name: part[number] for name, part in flat.items()}


def unpack_tensor(form: Format, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The values of a whole tensor of ``shape``, contiguous."""
    front, n, k = matrices_of(shape)
    some = next(iter(parts.values()))
    out = torch.empty((*front, n, k), dtype=dtype, device=some.device)
    for matrix, own in zip(out.reshape(prod(front), n, k), matrices_in(parts, front), strict=True):
        matrix.copy_(form.unpack(own, n, k))
    return out.reshape(tuple(shape))
