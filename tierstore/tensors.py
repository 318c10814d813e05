"""What is stored and what is fetched together, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tierstore.extents import Extent

ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element, by torch's name of the dtype (without ``torch.``)."""

KEEP = "keep"
"""No name of a format: the word, where one stands, for a tensor that is left as it is."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named contiguous tensor: ``dtype`` is torch's name, ``shape`` in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``extent`` of a store's file number ``file``, that land at byte ``at`` of a block."""

    file: int
    extent: Extent
    at: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes that must stand together in memory: one tensor, or several that share storage.

    ``align`` is the address alignment in bytes that keeps kernels' results bit-equal to a
    freshly allocated tensor. ``pieces`` say where the bytes lie in the store; together they
    cover ``[0, nbytes)`` exactly once.
    """

    name: str
    nbytes: int
    align: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is fetched together: the blocks of one execution step."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        """Weight bytes of the unit, without padding."""
        return sum(block.nbytes for block in self.blocks)
