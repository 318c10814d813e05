"""Where the bytes of a unit stand within a slot, and the fewest reads and copies that put them there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tierstore.extents import Extent, align_up
from tierstore.tensors import Block, Piece, Unit

SLOT_ALIGN = 4096
"""Address alignment, in bytes, of every slot: the largest that a block may ask for."""

DIRECT_SECTORS = 16
"""From this many sectors on, a run is worth the padding that lets it be read straight into the slot."""


@dataclass(frozen=True, slots=True)
class SlotRead:
    """The bytes ``extent`` of file number ``file`` land at byte ``at`` of the slot."""

    file: int
    extent: Extent
    at: int


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """A unit in a host slot of ``nbytes``: the offset of each block, and the reads that fill it, by ``at``."""

    nbytes: int
    offsets: Mapping[str, int]
    reads: tuple[SlotRead, ...]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A unit in a device slot of ``nbytes``: the offset and the bytes of each block, in the order of offsets."""

    nbytes: int
    offsets: Mapping[str, int]
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Run:
    """Blocks that keep their distances in the file: one displacement from file byte to slot byte for all.

    The displacement is ``residue`` modulo ``modulus``. A block of scattered pieces is a run by itself (``end`` None).
    """

    file: int
    start: int
    end: int | None
    residue: int
    modulus: int
    blocks: tuple[tuple[Block, int], ...]

    def joined(self, other: _Run, gap: int) -> _Run | None:
        """This run and ``other`` behind it as one, or None when they are not neighbours or cannot both be aligned."""
        if self.end is None or other.end is None or self.file != other.file:
            return None
        if not 0 <= other.start - self.end <= gap:
            return None
        fine, coarse = sorted((self, other), key=lambda run: run.modulus)
        if coarse.residue % fine.modulus != fine.residue:
            return None
        return replace(
            self,
            end=other.end,
            residue=coarse.residue,
            modulus=coarse.modulus,
            blocks=self.blocks + other.blocks,
        )

    def direct(self, sector: int) -> _Run:
        """The same run with file and slot congruent modulo ``sector``, when it is large and alignment allows."""
        large = sum(block.nbytes for block, _ in self.blocks) >= DIRECT_SECTORS * sector
        if not large or self.modulus >= sector or self.residue:
            return self
        return replace(self, modulus=sector)


def lay_out(unit: Unit, *, sector: int = 4096) -> SlotLayout:
    """Lay ``unit`` out in a host slot whose base is aligned to ``SLOT_ALIGN``.

    Every block stands at a multiple of its own ``align``. Blocks follow each other as in the file; neighbours
    that lie less than ``sector`` bytes apart keep their distance where alignment allows, so that one read brings
    both (and the bytes between). A run of at least ``DIRECT_SECTORS * sector`` bytes stands at its file offset
    modulo ``sector`` where alignment allows, so that O_DIRECT can read it in place. Padding is at most
    ``align + 2 * sector`` per block; in a unit smaller than ``sector``, at most ``2 * align``.

    Raises ``ValueError`` when pieces do not cover their block exactly once, an ``align`` is no power of two up to
    ``SLOT_ALIGN``, or two blocks share a name.
    """
    blocks = _in_file_order(unit)
    offsets: dict[str, int] = {}
    cursor = 0
    for run in _runs(blocks, sector, small=unit.nbytes < sector):
        # The first slot byte at or after the cursor that stands for the first file byte of the run.
        base = cursor + (run.start + run.residue - cursor) % run.modulus
        for block, start in run.blocks:
            offsets[block.name] = base + start - run.start
            cursor = max(cursor, offsets[block.name] + block.nbytes)
    reads = [
        SlotRead(piece.file, piece.extent, offsets[block.name] + piece.at)
        for block in blocks
        for piece in _pieces(block)
    ]
    return SlotLayout(cursor, offsets, tuple(_merged_reads(sorted(reads, key=lambda read: read.at), sector)))


def pack(unit: Unit, align: int = 256) -> PackedLayout:
    """Lay ``unit`` out densely in a device slot: blocks in file order, each at a multiple of ``align``.

    Raises ``ValueError`` as ``lay_out`` does.
    """
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    end = 0
    for block in _in_file_order(unit):
        offsets[block.name] = align_up(end, align)
        sizes[block.name] = block.nbytes
        end = offsets[block.name] + block.nbytes
    return PackedLayout(end, offsets, sizes)


def copies(layout: SlotLayout, packed: PackedLayout) -> tuple[tuple[int, int, int], ...]:
    """``(src_at, dst_at, nbytes)`` that bring a host slot into a device slot, in the order of ``dst_at``.

    Neighbours with the same distance on both sides are one copy, which then carries the padding between them.
    """
    merged: list[tuple[int, int, int]] = []
    for name, dst in packed.offsets.items():
        src, nbytes = layout.offsets[name], packed.sizes[name]
        if not nbytes:
            continue
        if merged and merged[-1][0] - merged[-1][1] == src - dst:
            first_src, first_dst, _ = merged.pop()
            src, dst, nbytes = first_src, first_dst, dst + nbytes - first_dst
        merged.append((src, dst, nbytes))
    return tuple(merged)


def _pieces(block: Block) -> list[Piece]:
    """The pieces that hold bytes, by their place in the block."""
    return sorted((piece for piece in block.pieces if piece.extent.nbytes), key=lambda piece: piece.at)


def _in_file_order(unit: Unit) -> list[Block]:
    """The blocks, validated, by where their first byte lies; empty ones first."""
    if len({block.name for block in unit.blocks}) != len(unit.blocks):
        raise ValueError(f"unit {unit.name!r} has two blocks of one name")
    for block in unit.blocks:
        if not 1 <= block.align <= SLOT_ALIGN or block.align & (block.align - 1):
            raise ValueError(
                f"block {block.name!r} asks for alignment {block.align}: not a power of two <= {SLOT_ALIGN}"
            )
        covered = 0
        for piece in _pieces(block):
            if piece.at != covered:
                raise ValueError(
                    f"block {block.name!r} of {block.nbytes} bytes: its pieces "
                    f"{'overlap' if piece.at < covered else 'leave a hole'} at byte {min(piece.at, covered)}"
                )
            covered += piece.extent.nbytes
        if covered != block.nbytes:
            raise ValueError(f"block {block.name!r} has {block.nbytes} bytes, but its pieces cover {covered}")

    def first_byte(block: Block) -> tuple[int, int]:
        pieces = _pieces(block)
        return (pieces[0].file, pieces[0].extent.offset) if pieces else (-1, 0)

    return sorted(unit.blocks, key=first_byte)


def _runs(blocks: Sequence[Block], sector: int, *, small: bool) -> Iterator[_Run]:
    """Group blocks, in file order, into runs as long as alignment allows."""
    run: _Run | None = None
    for block in blocks:
        pieces = _pieces(block)
        file, start = (pieces[0].file, pieces[0].extent.offset) if pieces else (-1, 0)
        scattered = any(piece.file != file or piece.extent.offset - piece.at != start for piece in pieces)
        single = _Run(
            file=file,
            start=start,
            end=None if scattered or not pieces else start + block.nbytes,
            residue=-start % block.align,
            modulus=block.align,
            blocks=((block, start),),
        )
        # A small unit reads no more between its blocks than the padding it would have had anyway.
        joined = run.joined(single, block.align - 1 if small else sector - 1) if run else None
        if run and not joined:
            yield run.direct(sector)
        run = joined or single
    if run:
        yield run.direct(sector)


def _merged_reads(reads: Sequence[SlotRead], sector: int) -> Iterator[SlotRead]:
    """Join reads, sorted by ``at``, that lie equally far apart in file and slot, by less than ``sector``."""
    last: SlotRead | None = None
    for read in reads:
        if (
            last
            and last.file == read.file
            and read.extent.offset - last.extent.offset == read.at - last.at
            and read.extent.offset - last.extent.end < sector
        ):
            last = replace(last, extent=Extent(last.extent.offset, read.extent.end - last.extent.offset))
            continue
        if last:
            yield last
        last = read
    if last:
        yield last
