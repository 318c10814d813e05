"""Cuts a unit into parts that pass through staging memory, each by few reads and few copies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tierstore.extents import Extent
from tierstore.slots import PackedLayout, SlotLayout, copies, lay_out
from tierstore.tensors import Block, Piece, Unit

SECTOR = 4096
MIN_ROOM = 4 * SECTOR
"""Bytes: the least staging memory that a part can be cut for."""


@dataclass(frozen=True, slots=True)
class Part:
    """``nbytes`` weight bytes of a unit: how they stand in staging memory, and the ``(src_at, dst_at, nbytes)``
    that bring them to their places in the device slot."""

    nbytes: int
    layout: SlotLayout
    copies: tuple[tuple[int, int, int], ...]


def whole(unit: Unit, packed: PackedLayout) -> Part:
    """The unit as one part, in ``lay_out(unit).nbytes`` of staging memory."""
    layout = lay_out(unit)
    return Part(unit.nbytes, layout, copies(layout, packed))


def cut(unit: Unit, packed: PackedLayout, room: int) -> tuple[Part, ...]:
    """The fewest whole-looking parts that need at most ``room`` bytes of staging memory each, in slot order.

    ``room`` is at least ``MIN_ROOM``. A part may begin and end in the middle of a block.
    """
    # Nothing computes on staging memory: without alignment, blocks can always keep their distances in the file.
    everything = whole(replace(unit, blocks=tuple(replace(block, align=1) for block in unit.blocks)), packed)
    if everything.layout.nbytes <= room:
        return (everything,)
    parts: list[Part] = []
    group: list[tuple[Block, int]] = []
    taken = 0
    for block, dst in _slices(unit, packed, (room - 3 * SECTOR) // SECTOR * SECTOR):
        need = block.nbytes + 2 * SECTOR + 1  # with the padding that lay_out may add
        if group and taken + need > room:
            parts.append(_part(group))
            group, taken = [], 0
        group.append((block, dst))
        taken += need
    return (*parts, _part(group))


def _slices(unit: Unit, packed: PackedLayout, most: int) -> Iterator[tuple[Block, int]]:
    """The blocks in slot order, in slices of up to ``most`` bytes, each with its place in the device slot."""
    blocks = {block.name: block for block in unit.blocks}
    for name, offset in packed.offsets.items():
        block = blocks[name]
        for start in range(0, block.nbytes, most):
            end = min(start + most, block.nbytes)
            yield Block(f"{name}@{start}", end - start, 1, tuple(_pieces(block, start, end))), offset + start


def _pieces(block: Block, start: int, end: int) -> Iterator[Piece]:
    for piece in block.pieces:
        first, last = max(start, piece.at), min(end, piece.at + piece.extent.nbytes)
        if first < last:
            yield Piece(piece.file, Extent(piece.extent.offset + first - piece.at, last - first), first - start)


def _part(group: list[tuple[Block, int]]) -> Part:
    unit = Unit("part", tuple(replace(block, name=str(number)) for number, (block, _) in enumerate(group)))
    offsets = {str(number): dst for number, (_, dst) in enumerate(group)}
    sizes = {block.name: block.nbytes for block in unit.blocks}
    layout = lay_out(unit)
    return Part(unit.nbytes, layout, copies(layout, PackedLayout(0, offsets, sizes)))
