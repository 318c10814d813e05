"""Laws of slot layouts, carried out on real bytes."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.extents import Extent
from tierstore.slots import SlotLayout, copies, lay_out, pack
from tierstore.tensors import Block, Piece, Unit

SIZES = st.one_of(st.integers(0, 300), st.sampled_from([64, 256, 4096, 5000, 65_536, 70_000]))
ALIGNS = st.sampled_from([1, 2, 16, 64, 256, 4096])


@st.composite
def stored_units(draw: st.DrawFn) -> tuple[Unit, list[bytes]]:
    """A unit of whole, split and empty blocks, and the files that hold it."""
    wanted = draw(st.lists(st.tuples(SIZES, ALIGNS, st.integers(1, 3)), max_size=8))
    random = Random(draw(st.integers(0, 999)))
    parts: list[tuple[int, int, int]] = []  # block, at, nbytes
    for number, (nbytes, _, count) in enumerate(wanted):
        cuts = sorted({0, nbytes, *(random.randrange(nbytes + 1) for _ in range(count - 1))})
        parts += [(number, at, end - at) for at, end in pairwise(cuts)]
    if draw(st.booleans()):
        random.shuffle(parts)
    pieces: dict[int, list[Piece]] = {number: [] for number in range(len(wanted))}
    sizes = [0, 0]
    gaps = draw(st.sampled_from([[0], [0, 0, 8], [0, 100, 5000], [1, 63]]))
    for number, at, nbytes in parts:
        file = random.choice([0, 0, 0, 1])
        offset = sizes[file] + random.choice(gaps)
        pieces[number].append(Piece(file, Extent(offset, nbytes), at))
        sizes[file] = offset + nbytes
    blocks = [
        Block(f"block {number}", nbytes, align, tuple(pieces[number]))
        for number, (nbytes, align, _) in enumerate(wanted)
    ]
    random.shuffle(blocks)
    return Unit("unit", tuple(blocks)), [random.randbytes(size) for size in sizes]


def fill(layout: SlotLayout, files: list[bytes]) -> bytearray:
    """Carry the reads out; each slot byte is written at most once, so the order of reads is free."""
    slot = bytearray(layout.nbytes)
    written = bytearray(layout.nbytes)
    for read in layout.reads:
        data = files[read.file][read.extent.offset : read.extent.end]
        assert len(data) == read.extent.nbytes > 0
        assert read.at + len(data) <= layout.nbytes
        assert not any(written[read.at : read.at + len(data)])
        written[read.at : read.at + len(data)] = b"\x01" * len(data)
        slot[read.at : read.at + len(data)] = data
    return slot


def content(block: Block, files: list[bytes]) -> bytes:
    pieces = sorted(block.pieces, key=lambda piece: (piece.at, piece.extent.nbytes))
    return b"".join(files[piece.file][piece.extent.offset : piece.extent.end] for piece in pieces)


@given(stored=stored_units(), sector=st.sampled_from([512, 4096]))
def test_reads_bring_every_byte_to_its_aligned_place(stored: tuple[Unit, list[bytes]], sector: int) -> None:
    unit, files = stored
    layout = lay_out(unit, sector=sector)
    slot = fill(layout, files)
    for block in unit.blocks:
        at = layout.offsets[block.name]
        assert at % block.align == 0
        assert slot[at : at + block.nbytes] == content(block, files)
    assert layout.offsets.keys() == {block.name for block in unit.blocks}


@given(stored=stored_units(), sector=st.sampled_from([512, 4096]))
def test_padding_is_bounded(stored: tuple[Unit, list[bytes]], sector: int) -> None:
    unit, _ = stored
    layout = lay_out(unit, sector=sector)
    if unit.nbytes < sector:
        bound = sum(2 * block.align for block in unit.blocks)
    else:
        bound = sum(block.align + 2 * sector for block in unit.blocks)
    assert unit.nbytes <= layout.nbytes <= unit.nbytes + bound
    assert sum(read.extent.nbytes for read in layout.reads) <= layout.nbytes
    assert len(layout.reads) <= sum(len(block.pieces) for block in unit.blocks)


@given(stored=stored_units(), align=st.sampled_from([1, 64, 256]))
def test_copies_bring_the_host_slot_into_the_device_slot(stored: tuple[Unit, list[bytes]], align: int) -> None:
    unit, files = stored
    layout, packed = lay_out(unit), pack(unit, align)
    host, device = fill(layout, files), bytearray(packed.nbytes)
    end = 0
    for src, dst, nbytes in copies(layout, packed):
        assert dst >= end
        end = dst + nbytes
        assert src + nbytes <= layout.nbytes
        assert end <= packed.nbytes
        device[dst:end] = host[src : src + nbytes]
    for block in unit.blocks:
        at = packed.offsets[block.name]
        assert at % align == 0
        assert device[at : at + block.nbytes] == content(block, files)
    assert packed.nbytes <= unit.nbytes + align * len(unit.blocks)


@given(
    start=st.integers(0, 10_000).map(lambda n: 8 * n),
    sizes=st.lists(st.integers(1, 300).map(lambda n: 256 * n), min_size=1, max_size=12),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_contiguous_unit_is_one_read_and_one_copy(start: int, sizes: list[int], shuffle: Random) -> None:
    blocks, offset = [], start
    for number, nbytes in enumerate(sizes):
        blocks.append(Block(str(number), nbytes, 8, (Piece(0, Extent(offset, nbytes)),)))
        offset += nbytes
    shuffle.shuffle(blocks)
    unit = Unit("layer", tuple(blocks))
    layout = lay_out(unit)
    assert [(read.file, read.extent) for read in layout.reads] == [(0, Extent(start, sum(sizes)))]
    at = layout.reads[0].at
    assert copies(layout, pack(unit)) == ((at, 0, sum(sizes)),)
    if sum(sizes) >= 65_536:
        assert at == start % 4096  # O_DIRECT can read it in place
    else:
        assert at < 8


def block(name: str, offset: int, nbytes: int, align: int, *, file: int = 0) -> Block:
    return Block(name, nbytes, align, (Piece(file, Extent(offset, nbytes)),))


def test_alignment_that_the_file_cannot_keep_splits_the_read() -> None:
    unit = Unit("u", (block("a", 0, 100_000, 64), block("b", 100_008, 100_000, 64)))
    layout = lay_out(unit)
    assert [read.extent for read in layout.reads] == [Extent(0, 100_000), Extent(100_008, 100_000)]
    assert layout.offsets["a"] % 4096 == 0
    assert layout.offsets["b"] == 100_032


def test_a_large_run_stands_congruent_only_where_alignment_allows() -> None:
    allowed = lay_out(Unit("u", (block("a", 8 + 64 * 3, 1 << 20, 8),)))
    assert allowed.reads[0].at == 200
    forbidden = lay_out(Unit("u", (block("a", 8 + 64 * 3, 1 << 20, 64),)))
    assert forbidden.reads[0].at == 0


def test_a_small_gap_is_read_through_and_a_large_one_is_not() -> None:
    near = lay_out(Unit("u", (block("a", 0, 8192, 8), block("b", 8192 + 4088, 8192, 8))))
    assert [read.extent for read in near.reads] == [Extent(0, 8192 + 4088 + 8192)]
    far = lay_out(Unit("u", (block("a", 0, 8192, 8), block("b", 8192 + 4096, 8192, 8))))
    assert len(far.reads) == 2
    assert far.nbytes == 16_384


def test_a_small_unit_does_not_keep_the_gaps_of_its_file() -> None:
    layout = lay_out(Unit("u", (block("a", 0, 100, 2), block("b", 1100, 100, 2))))
    assert (layout.nbytes, len(layout.reads)) == (200, 2)


def test_padding_of_a_sector_or_more_is_not_read() -> None:
    layout = lay_out(Unit("u", (block("a", 0, 1000, 1), block("b", 4096, 100, 4096))), sector=512)
    assert [read.extent for read in layout.reads] == [Extent(0, 1000), Extent(4096, 100)]
    assert layout.offsets == {"a": 0, "b": 4096}


def test_a_gap_within_a_block_is_never_read_through() -> None:
    pieces = (Piece(0, Extent(0, 10), 0), Piece(1, Extent(0, 10), 10), Piece(0, Extent(20, 10), 20))
    layout = lay_out(Unit("u", (Block("a", 30, 1, pieces),)))
    assert [(read.file, read.extent, read.at) for read in layout.reads] == [
        (0, Extent(0, 10), 0),
        (1, Extent(0, 10), 10),
        (0, Extent(20, 10), 20),
    ]


def test_pieces_next_to_each_other_are_one_read() -> None:
    pieces = tuple(Piece(0, Extent(100 + 10 * n, 10), 10 * n) for n in (2, 0, 1))
    layout = lay_out(Unit("u", (Block("a", 30, 4, pieces),)))
    assert [read.extent for read in layout.reads] == [Extent(100, 30)]


def test_bytes_shared_by_two_blocks_are_read_for_each() -> None:
    layout = lay_out(Unit("u", (block("a", 0, 100, 4), block("b", 50, 100, 2))))
    assert len(layout.reads) == 2
    assert layout.nbytes == 200


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((), "cover 0"),
        ((Piece(0, Extent(0, 10), 1),), "hole at byte 0"),
        ((Piece(0, Extent(0, 9), 0),), "cover 9"),
        ((Piece(0, Extent(0, 11), 0),), "cover 11"),
        ((Piece(0, Extent(0, 6), 0), Piece(0, Extent(6, 4), 5)), "overlap at byte 5"),
        ((Piece(0, Extent(0, 5), 0), Piece(0, Extent(6, 4), 6)), "hole at byte 5"),
    ],
)
def test_pieces_must_cover_their_block_exactly_once(pieces: tuple[Piece, ...], message: str) -> None:
    unit = Unit("u", (Block("weight", 10, 1, pieces),))
    with pytest.raises(ValueError, match=f"'weight'.*{message}"):
        lay_out(unit)
    with pytest.raises(ValueError, match=f"'weight'.*{message}"):
        pack(unit)


def test_impossible_units_are_refused() -> None:
    for align in (0, 3, 8192):
        with pytest.raises(ValueError, match="align"):
            lay_out(Unit("u", (block("a", 0, 10, align),)))
    with pytest.raises(ValueError, match="two blocks of one name"):
        lay_out(Unit("u", (block("a", 0, 10, 1), block("a", 10, 10, 1))))


def test_a_unit_without_bytes_needs_no_slot() -> None:
    unit = Unit("u", (Block("a", 0, 64, ()), Block("b", 0, 1, (Piece(0, Extent(7, 0)),))))
    layout = lay_out(unit)
    assert (layout.nbytes, layout.reads, layout.offsets) == (0, (), {"a": 0, "b": 0})
    assert copies(layout, pack(unit)) == ()
