"""A matrix of weights as float32, one block of 64 rows and a few thousand columns at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.extents import align_up
from tierstore.kernels.int4_matmul.reference import ROWS
from tierstore.tensors import TensorSpec

WIDTH = 4096
"""Columns at a time: with 64 rows 1 MiB of float32. At 1024 the small steps of a search, on one value a group, made it
take 1.5 times as long; at 8192 it took as long."""

LARGEST = 2.0**120
"""Beyond it, sums and scales of a group could overflow float32."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``[64 number, 64 number + 64)`` and columns ``[start, stop)`` of a matrix padded to whole blocks."""

    number: int
    start: int
    stop: int
    group: int

    @property
    def rows(self) -> slice:
        return slice(self.number * ROWS, (self.number + 1) * ROWS)

    @property
    def groups(self) -> slice:
        return slice(self.start // self.group, self.stop // self.group)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, their members, rows: how ``Blocks.columns`` gives it."""
        return (self.stop - self.start) // self.group, self.group, ROWS


class Blocks:
    """Reads ``matrix``, floating [n, k] of any strides, block by block into memory that it reuses.

    Rows beyond the matrix read as zeros. Columns beyond it, up to a multiple of ``group``, repeat those of the last
    group in turn, so that they leave its range alone and its error nearly so.
    """

    def __init__(self, matrix: Tensor, group: int) -> None:
        self._matrix, self._group = matrix.detach(), group
        self._columns = align_up(matrix.shape[1], group)
        self._width = min(max(WIDTH // group, 1) * group, self._columns)
        self._rows, self._turned = matrix.new_empty((2, ROWS * self._width), dtype=torch.float32).unbind(0)
        self.memory = matrix.new_empty(2 * ROWS * max(WIDTH, self._width), dtype=torch.float32)
        """For any use: two tensors like ``columns``, or many where the matrix is narrow."""

    def numbers(self) -> range:
        """Of the blocks of 64 rows; none where the matrix is empty."""
        return range(align_up(self._matrix.shape[0], ROWS) // ROWS if self._columns else 0)

    def across(self, number: int) -> Iterator[Block]:
        """The blocks of the same 64 rows, from left to right."""
        for start in range(0, self._columns, self._width):
            yield Block(number, start, min(start + self._width, self._columns), self._group)

    def __iter__(self) -> Iterator[Block]:
        for number in self.numbers():
            yield from self.across(number)

    def columns(self, block: Block) -> Tensor:
        """Float32 [groups, group, 64], valid until the next call: with 64 neighbouring rows innermost every step of a
        search is a plain vector loop, and codes come out in the order of ``tile64``."""
        turned = within(self._turned, block)
        turned.view(-1, ROWS).copy_(self._read(block).T)
        return turned

    def scratch(self, block: Block) -> tuple[Tensor, Tensor]:
        """Memory for two more tensors like ``columns``."""
        first, second = self.memory.view(2, -1).unbind(0)
        return within(first, block), within(second, block)

    def ranges(self, number: int) -> tuple[Tensor, Tensor]:
        """The least and the most of every group across 64 rows, float32 [k / group, 64]; checked."""
        low, high = self._rows.new_empty((2, self._columns // self._group, ROWS)).unbind(0)
        for block in self.across(number):
            grouped = self._read(block).view(ROWS, -1, self._group)
            low[block.groups], high[block.groups] = grouped.amin(2).T, grouped.amax(2).T
        self.check(low, high)
        return low, high

    def check(self, low: Tensor, high: Tensor) -> None:
        """Raises ``ModuleError``, with how many values of the matrix are wrong, where a range is not finite."""
        if bool(((low >= -LARGEST) & (high <= LARGEST)).all()):
            return
        starts = range(0, len(self._matrix), ROWS)
        sizes = (self._matrix[start : start + ROWS].to(torch.float32).abs() for start in starts)
        wrong = sum(size.numel() - int((size <= LARGEST).sum()) for size in sizes)
        raise ModuleError(
            f"{wrong} of {self._matrix.numel()} values are NaN, infinite or beyond {LARGEST:.2g} in magnitude, which a "
            "packed format cannot hold: mend the weights, or keep this tensor as it is"
        )

    def _read(self, block: Block) -> Tensor:
        """Float32 [64, stop - start], valid until the next call."""
        first, start, width, (n, k) = block.number * ROWS, block.start, block.stop - block.start, self._matrix.shape
        real_rows, real = min(ROWS, n - first), min(block.stop, k) - start
        rows = within(self._rows, block).view(ROWS, width)
        rows[:real_rows, :real] = self._matrix[first : first + real_rows, start : start + real]
        rows[real_rows:] = 0
        if real < width:
            own = k % self._group
            turn = torch.arange(width - real, device=rows.device) % own
            rows[:, real:] = rows[:, real - own + turn]
        return rows


def zero_parts(specs: Iterable[TensorSpec], like: Tensor) -> dict[str, Tensor]:
    """Parts to be written into, on the device of ``like``. What stays zero decodes to zero."""
    return {part.name: like.new_zeros(part.shape, dtype=getattr(torch, part.dtype)) for part in specs}


def within(memory: Tensor, block: Block) -> Tensor:
    """The start of ``memory`` in the shape of ``block``."""
    groups, members, rows = block.shape
    return memory[: groups * members * rows].view(block.shape)
