"""What every format of packed weights has in common: names, parts, and how a tensor is seen as matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from tierstore.tensors import TensorSpec

MATRIX_FROM = 32
"""A last axis of at least this many elements is the input axis of a matrix; a shorter one (a convolution's) is not."""

Parts = Mapping[str, Tensor]
"""A packed matrix: plain tensors by part name, such as ``codes`` and ``scales``. With axes in front, a stack of them."""


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
    front, n, k = matrices_of(tensor.shape)
    if not front:
        return form.pack(tensor.reshape(n, k))
    flat = tensor.reshape(-1, n, k)
    made: dict[str, Tensor] = {}
    for number, matrix in enumerate(flat):
        for name, part in form.pack(matrix).items():
            whole = made.setdefault(name, part.new_empty((len(flat), *part.shape)))
            whole[number] = part
    return {name: part.reshape(*front, *part.shape[1:]) for name, part in made.items()}


def unpack_tensor(form: Format, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The values of a whole tensor of ``shape``, contiguous."""
    front, n, k = matrices_of(shape)
    some = next(iter(parts.values()))
    out = torch.empty((*front, n, k), dtype=dtype, device=some.device)
    flat = out.reshape(-1, n, k)
    for number in range(len(flat)):
        inside = {name: part.reshape(-1, *part.shape[len(front) :])[number] for name, part in parts.items()}
        flat[number] = form.unpack(inside, n, k)
    return out.reshape(tuple(shape))
