"""Packed stores: readable by any Zarr reader, whole or refused, every byte checked, gone on with after a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores.packed_hostile import (
    UNITS,
    WRONG,
    fill,
    flip,
    group,
    pack,
    plan_of,
    sample,
    signed,
    truth_of,
    without_errors,
)
from tierstore.contracts import ReadRequest
from tierstore.errors import (
    ChecksumError,
    ModuleError,
    StoreError,
    StoreFormatError,
    StoreReadError,
)
from tierstore.extents import Extent
from tierstore.stores import packed, reader
from tierstore.stores.manifest import (
    LAYOUT_VERSION,
    Manifest,
    PackedEntry,
    PackedUnit,
    check_parts,
    parse_manifest,
    text_crc32c,
)
from tierstore.stores.packed import PackedStore, is_packed
from tierstore.stores.packed_files import WINDOW, parse_unit, unit_document
from tierstore.stores.packed_writer import PackedWriter
from tierstore.stores.verifying import verify
from tierstore.stores.windows import Windows, spans_of
from tierstore.tensors import ITEMSIZE, TensorSpec
from tierstore.testing.store_contract import Opened, StoreContract, as_buffer, open_descriptors, read_tensor

TENSORS = sample()
TRUTH = truth_of(TENSORS)
PLAN_OF_SAMPLE = plan_of(TENSORS, UNITS)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "OUT"


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole store that no test changes."""
    out = tmp_path_factory.mktemp("packed") / "OUT"
    pack(out)
    return out


@pytest.fixture
def store(packed_once: Path) -> Iterator[PackedStore]:
    opened = PackedStore(packed_once)
    yield opened
    opened.close()


@pytest.fixture
def copy(packed_once: Path, out: Path) -> Path:
    """A whole store of the test's own."""
    shutil.copytree(packed_once, out)
    return out


class TestContract(StoreContract):
    @pytest.fixture
    def opened(self, packed_once: Path) -> Iterator[Opened]:
        store = PackedStore(packed_once)
        yield store, TRUTH
        store.close()


class TestContractOfManyFiles(StoreContract):
    """More files than may stay open."""

    @pytest.fixture
    def opened(self, packed_once: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
        monkeypatch.setattr(reader, "KEPT_OPEN", 1)
        store = PackedStore(packed_once, threads=2)
        yield store, TRUTH
        store.close()


class TestContractWhereWindowsAreCheckedFewAtATime(StoreContract):
    """Nothing is read beside what is asked for, so that windows are completed behind the read."""

    @pytest.fixture
    def opened(self, packed_once: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
        monkeypatch.setattr(packed, "_AT_ONCE", WINDOW)
        store = PackedStore(packed_once)
        yield store, TRUTH
        store.close()


# What is written


def test_the_manifest_says_what_was_packed(store: PackedStore) -> None:
    manifest = store.manifest
    assert without_errors(manifest) == PLAN_OF_SAMPLE
    assert list(manifest.tensors) == list(TENSORS)
    entry = manifest.tensors["layers.0.q.weight"]
    assert (entry.format, entry.dtype, entry.shape, entry.relative_error) == ("int4", "bfloat16", (64, 200), 1.125)
    assert entry.nbytes == 64 * 100 + 64 * 16
    assert manifest.tensors["layers.0.norm"].relative_error is None
    assert manifest.nbytes == sum(path.stat().st_size for path in store.paths)
    assert manifest.layout_version == LAYOUT_VERSION
    assert parse_manifest(manifest.document().encode(), "it") == manifest


def test_tensors_lie_at_pages_in_order(store: PackedStore) -> None:
    for number, unit in enumerate(store.manifest.units):
        at = 0
        for entry in unit.tensors:
            for spec in entry.stored:
                (piece,) = store.pieces(spec.name)
                assert (piece.file, piece.extent, piece.at) == (number, Extent(at, spec.nbytes), 0)
                at += -(-spec.nbytes // 4096) * 4096
        raw = store.paths[number].read_bytes()
        assert len(raw) == at == unit.nbytes
        for _, extent in unit.placed:
            assert not any(raw[extent.end : -(-extent.end // 4096) * 4096])


def test_zarr_reads_the_same_bytes(store: PackedStore, packed_once: Path) -> None:
    group = zarr.open_group(packed_once / "weights.zarr", mode="r")
    found = {}
    for _, array in group.arrays():
        assert isinstance(array, zarr.Array)
        raw = np.asarray(array[:])
        mine: Any = array.attrs["tierstore"]
        for part in mine["parts"]:
            found[part["name"]] = raw[part["offset"] : part["offset"] + part["nbytes"]].tobytes()
            assert store.specs[part["name"]] == TensorSpec(part["name"], part["dtype"], tuple(part["shape"]))
        for number, crc in enumerate(mine["crc32c"]):
            assert f"{text_crc32c(raw[number * WINDOW :][:WINDOW].tobytes()):08x}" == crc
    assert found == TRUTH
    about: Any = group.attrs["tierstore"]
    assert signed(dict(about)) == about


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_documents_are_those_that_zarr_writes(tmp_path: Path, size: int) -> None:
    unit = PackedUnit((PackedEntry("w", "keep", "uint8", (size,), ()),))
    theirs = zarr.create_group(tmp_path / "theirs")
    nbytes = unit.nbytes
    theirs.create_array(
        "w", shape=(nbytes,), chunks=(max(nbytes, 1),), dtype="uint8", compressors=None, filters=None, fill_value=0
    )
    for ours, path in (
        (unit_document(unit, [1] * (nbytes > 0)), tmp_path / "theirs" / "w" / "zarr.json"),
        (Manifest({}, "keep", (unit,)).document(), tmp_path / "theirs" / "zarr.json"),
    ):
        document, expected = json.loads(ours), json.loads(path.read_text())
        assert document.pop("attributes").keys() == {"tierstore"}
        assert expected.pop("attributes") == {}
        assert document == expected


def test_packing_is_deterministic(tmp_path: Path, packed_once: Path) -> None:
    pack(tmp_path / "again")
    assert content(tmp_path / "again") == content(packed_once)
    assert os.listdir(tmp_path) == ["again"]


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = st.sampled_from(sorted(ITEMSIZE))


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_whatever_is_packed_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    out = tmp_path_factory.mktemp("law") / "OUT"
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))

    def tensor() -> torch.Tensor:
        dtype, shape = getattr(torch, data.draw(DTYPES)), data.draw(SHAPES)
        raw = torch.empty(shape, dtype=torch.uint8 if dtype is torch.bool else dtype)
        bytes_of = raw.reshape(-1).view(torch.uint8)
        bytes_of.copy_(torch.randint(0, 2, bytes_of.shape, dtype=torch.uint8, generator=random))
        return raw.bool() if dtype is torch.bool else raw

    names = data.draw(st.lists(st.text(st.characters(min_codepoint=32, codec="utf-8"), min_size=1), unique=True))
    tensors: dict[str, Any] = {name + "!": tensor() for name in names}
    for name in names[::2]:
        tensors[name + "!"] = {"codes": tensor(), "scales": tensor()}
    cuts = sorted(data.draw(st.lists(st.integers(1, len(names)), max_size=3))) if names else []
    bounds = [0, *cuts, len(names)]
    units = tuple(tuple(list(tensors)[a:b]) for a, b in pairwise(bounds) if a < b)
    plan = plan_of(tensors, units)
    with PackedWriter(out, plan) as writer:
        fill(writer, tensors, plan)
        manifest = writer.finish()
    store = PackedStore(out)
    try:
        assert store.manifest == manifest
        truth = truth_of(tensors)
        assert store.specs.keys() == truth.keys()
        for name, raw in truth.items():
            assert torch.equal(read_tensor(store, name), as_buffer(raw)), name
    finally:
        store.close()
    assert verify(out) == ()


def test_tensors_need_not_be_contiguous_or_plain(out: Path) -> None:
    one = torch.complex(torch.arange(12.0), torch.ones(12)).reshape(3, 4)
    tensors = {"t": one.t(), "conj": one.conj(), "neg": one.conj().imag, "grad": torch.ones(3, requires_grad=True)}
    plan = plan_of(tensors, (tuple(tensors),))
    with PackedWriter(out, plan) as writer:
        fill(writer, tensors, plan)
        writer.finish()
    store = PackedStore(out)
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        assert torch.equal(read_tensor(store, name).view(plain.dtype).reshape(plain.shape), plain)
    store.close()


# Wrong stores


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_store_is_refused_and_kept(kind: str, copy: Path) -> None:
    wrong = WRONG[kind]
    wrong.change(copy)
    before, threads, descriptors = sorted(copy.rglob("*")), set(threading.enumerate()), open_descriptors()
    with pytest.raises(StoreError, match=wrong.match) as caught:
        PackedStore(copy)
    assert type(caught.value) is wrong.error
    assert "OUT" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert sorted(copy.rglob("*")) == before
    assert open_descriptors() == descriptors
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("kind", WRONG)
def test_verify_says_what_is_wrong(kind: str, copy: Path) -> None:
    WRONG[kind].change(copy)
    try:
        said = verify(copy)
    except StoreError as error:
        said = (str(error),)
    assert "\n".join(said)
    assert all("OUT" in line for line in said)


def test_a_flipped_bit_of_the_manifest_is_found(packed_once: Path) -> None:
    raw = (packed_once / "weights.zarr" / "zarr.json").read_bytes()
    whole = parse_manifest(raw, "it")
    blank = 0
    for at in range(len(raw)):
        for bit in range(8):
            changed = raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
            try:
                manifest = parse_manifest(changed, "it")
            except (StoreFormatError, ChecksumError):
                continue
            assert manifest == whole, changed[max(at - 20, 0) : at + 20]  # a blank became another blank
            blank += 1
    assert blank < len(raw) // 10


@pytest.mark.parametrize("number", range(3))
def test_a_flipped_bit_of_a_document_is_found(copy: Path, number: int) -> None:
    path = copy / "weights.zarr" / f"unit-{number:05d}" / "zarr.json"
    random = Random(number)
    for _ in range(25):
        at, bit = random.randrange(path.stat().st_size), random.randrange(8)
        flip(path, at, bit)
        with pytest.raises((StoreFormatError, ChecksumError)):
            PackedStore(copy)
        flip(path, at, bit)
    PackedStore(copy).close()


def test_a_document_is_read_as_it_was_written() -> None:
    unit = PLAN_OF_SAMPLE.units[1]
    errors = replace(unit, tensors=(replace(unit.tensors[0], relative_error=0.25), *unit.tensors[1:]))
    assert parse_unit(unit_document(errors, [7]).encode(), unit, "it") == (errors, (7,))


def flipped(copy: Path, name: str, at: int) -> Callable[[], None]:
    """Flips a bit of byte ``at`` of a stored tensor (negative: of the padding behind it); the change taken back."""
    store = PackedStore(copy)
    (piece,) = store.pieces(name)
    path, offset = store.paths[piece.file], piece.extent.offset + (at if at >= 0 else piece.extent.nbytes - at)
    store.close()
    flip(path, offset)
    return lambda: flip(path, offset)


@pytest.mark.parametrize(
    ("name", "at"),
    [("embed.weight", 0), ("embed.weight", WINDOW), ("embed.weight", 2_799_999), ("layers.0.q.weight.scales", 5)],
)
@pytest.mark.parametrize("much", ["all", "one byte", "another part"])
def test_a_flipped_bit_is_found_at_the_first_read(copy: Path, name: str, at: int, much: str) -> None:
    take_back = flipped(copy, name, at)
    store = PackedStore(copy)
    (piece,) = store.pieces(name)
    extents = {
        "all": piece.extent,
        "one byte": Extent(piece.extent.offset + at, 1),
        "another part": Extent(max(at // WINDOW * WINDOW, piece.extent.offset), 3),
    }
    into = torch.empty(extents[much].nbytes, dtype=torch.uint8)
    number = (piece.extent.offset + at) // WINDOW
    for _ in range(2):
        fence = store.read([ReadRequest(piece.file, extents[much], into)])
        with pytest.raises(ChecksumError, match=rf"'{name}'.*unit-0000.*at byte {number * WINDOW} have CRC32C.*again"):
            fence.wait()
        assert fence.done()
    for other in TRUTH.keys() - {spec.name for spec, _ in store.manifest.units[piece.file].placed}:
        assert torch.equal(read_tensor(store, other), as_buffer(TRUTH[other]))
    take_back()
    assert torch.equal(read_tensor(store, name), as_buffer(TRUTH[name]))
    store.close()


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.q.weight.codes", "layers.1.q.weight.scales", "count"])
def test_a_flipped_bit_of_padding_is_found(copy: Path, name: str) -> None:
    flipped(copy, name, -10)
    store = PackedStore(copy)
    last = store.specs[name].nbytes - 1
    (piece,) = store.pieces(name)
    request = ReadRequest(piece.file, Extent(piece.extent.offset + last, 1), torch.empty(1, dtype=torch.uint8))
    with pytest.raises(ChecksumError, match="CRC32C"):
        store.read([request]).wait()
    store.close()
    (line,) = verify(copy)
    assert name in line


def test_windows_beside_a_wrong_one_are_read(copy: Path) -> None:
    flipped(copy, "embed.weight", WINDOW + 5)
    store = PackedStore(copy)
    data = TRUTH["embed.weight"]
    for offset in (0, 2 * WINDOW):
        into = torch.empty(1000, dtype=torch.uint8)
        store.read([ReadRequest(0, Extent(offset, 1000), into)]).wait()
        assert torch.equal(into, as_buffer(data[offset : offset + 1000]))
    into = torch.empty(2 * WINDOW, dtype=torch.uint8)
    with pytest.raises(ChecksumError, match=f"at byte {WINDOW} "):
        store.read([ReadRequest(0, Extent(0, 2 * WINDOW), into)]).wait()
    store.close()


def test_a_window_is_checked_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PackedStore(copy)
    for name in TRUTH:
        read_tensor(store, name)
    monkeypatch.setattr(PackedStore, "check", lambda *_: pytest.fail("checked again"))
    flipped(copy, "embed.weight", 0)
    changed = read_tensor(store, "embed.weight")
    assert changed[0] == TRUTH["embed.weight"][0] ^ 1
    store.close()


def test_scattered_bytes_complete_their_windows_with_little_memory(
    packed_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_AT_ONCE", WINDOW)
    store = PackedStore(packed_once)
    made: list[int] = []
    plain = torch.empty

    def empty(nbytes: int, **options: Any) -> torch.Tensor:
        made.append(nbytes)
        return plain(nbytes, **options)

    rows = torch.zeros(700, 8, dtype=torch.uint8)
    requests = [ReadRequest(0, Extent(row * 4000 + 100, 8), rows[row]) for row in range(0, 700, 2)]
    monkeypatch.setattr(torch, "empty", empty)
    store.read(requests).wait()
    table = torch.tensor(list(TRUTH["embed.weight"]), dtype=torch.uint8).reshape(700, 4000)
    assert torch.equal(rows[::2], table[::2, 100:108])
    assert len(made) == 3
    assert all(size <= WINDOW for size in made)
    store.close()


def test_closing_ends_checks_under_way(packed_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_AT_ONCE", 0)
    for _ in range(5):
        store = PackedStore(packed_once)
        into = torch.empty(100, dtype=torch.uint8)
        fences = [store.read([ReadRequest(0, Extent(at, 100), into)]) for at in (0, WINDOW, 2 * WINDOW)]
        store.close()
        for fence in fences:
            assert fence.done()
            with suppress(StoreReadError):  # it was read before, or not
                fence.wait()


def test_a_dropped_store_ends_its_threads_and_closes_its_files(packed_once: Path) -> None:
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    store = PackedStore(packed_once)
    read_tensor(store, "count")
    mine = set(threading.enumerate()) - threads
    del store
    for thread in mine:
        thread.join(60)
        assert not thread.is_alive()
    assert open_descriptors() == descriptors


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 1 << 32))
def test_windows_agree_with_plain_sums(seed: int) -> None:
    random = Random(seed)
    size = 16
    files = [random.randbytes(random.choice([0, 1, 16, 40, 100])) for _ in range(3)]
    crcs = [[text_crc32c(f[at : at + size]) for at in range(0, len(f), size)] for f in files]
    memory = [as_buffer(f) for f in files]
    windows = Windows([len(f) for f in files], crcs, size)
    right: set[tuple[int, int]] = set()
    for _ in range(6):
        requests = []
        for _ in range(random.randrange(5)):
            file = random.randrange(3)
            offset = random.randint(0, len(files[file]))
            nbytes = random.randint(0, len(files[file]) - offset)
            requests.append(ReadRequest(file, Extent(offset, nbytes), memory[file][offset : offset + nbytes]))
        touched = {(r.file, at // size) for r in requests for at in range(r.extent.offset, r.extent.end)}
        unchecked = windows.unchecked(requests)
        assert unchecked == sorted(touched - right)
        have = {(r.file, at) for r in requests for at in range(r.extent.offset, r.extent.end)}
        spans = spans_of(requests)
        gaps = [(file, at) for file, e in windows.gaps(unchecked, spans) for at in range(e.offset, e.end)]
        need = {(w[0], at) for w in unchecked for at in range(windows.extent(w).offset, windows.extent(w).end)}
        assert len(gaps) == len(set(gaps))
        assert set(gaps) == need - have
        more = [ReadRequest(f, e, memory[f][e.offset : e.end].clone()) for f, e in windows.gaps(unchecked, spans)]
        spans = spans_of([*requests, *more])
        for window in unchecked:
            extent = windows.extent(window)
            broken = random.random() < 0.3
            if broken:
                memory[window[0]][extent.offset] ^= 1
            covered = any(r.file == window[0] and r.extent.offset <= extent.offset < r.extent.end for r in requests)
            wrong = windows.check(window, spans)
            if broken and covered:
                now = bytes(memory[window[0]][extent.offset : extent.end].tolist())
                # What came with ``more`` is a copy of the bytes as they were, which only the first byte differs from.
                assert wrong == (text_crc32c(now), crcs[window[0]][window[1]])
            else:
                assert wrong is None
                right.add(window)
            if broken:
                memory[window[0]][extent.offset] ^= 1


def test_a_link_to_a_file_is_as_good(copy: Path, tmp_path: Path) -> None:
    """Caches of downloads hold links to the files."""
    for number, path in enumerate(sorted(p for p in copy.rglob("*") if p.is_file())):
        blob = tmp_path / f"blob-{number}"
        path.rename(blob)
        path.symlink_to(blob)
    store = PackedStore(copy)
    for name, data in TRUTH.items():
        assert torch.equal(read_tensor(store, name), as_buffer(data))
    store.close()
    assert verify(copy) == ()


def test_a_store_without_rights_says_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def refuse(path: Any, *rest: Any, **options: Any) -> int:
        if str(path).endswith("unit-00001/c/0"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=r"cannot open .*unit-00001.*Permission denied"):
        PackedStore(copy)
    (line,) = verify(copy)
    assert "Permission denied" in line


def test_parts_are_compared_with_their_formats(store: PackedStore) -> None:
    wanted = store.manifest.tensors["layers.0.q.weight"].parts
    asked = []

    def give(parts: tuple[TensorSpec, ...], form: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return parts

    def parts_of(form: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        asked.append((form, shape))
        return wanted

    check_parts(store.manifest, parts_of, "'OUT'")
    assert asked == [("int4", (64, 200))] * 2
    others: list[tuple[TensorSpec, ...]] = [wanted[:1], wanted[::-1], (*wanted, wanted[0])]
    for other in (*others, (replace(wanted[0], dtype="int8"), wanted[1])):
        with pytest.raises(StoreFormatError, match=r"'layers.0.q.weight' of 'OUT' .* codes uint8 \[64, 100\].* needed"):
            check_parts(store.manifest, partial(give, other), "'OUT'")

    def unknown(form: str, shape: tuple[int, ...]) -> NoReturn:
        raise ModuleError(f"no format {form!r}")

    with pytest.raises(StoreFormatError, match="no format 'int4': or upgrade tierstore"):
        check_parts(store.manifest, unknown, "'OUT'")


def test_packed_stores_are_recognised(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_packed(copy)
    assert is_packed(str(copy))
    assert not is_packed(tmp_path)
    assert not is_packed(tmp_path / "nothing")
    assert not is_packed("a\0b")
    monkeypatch.chdir(copy)
    assert is_packed(".")
    PackedStore(".").close()
    monkeypatch.chdir(tmp_path)
    assert not is_packed(".")
    with pytest.raises(StoreError, match=r"holds no weights.zarr"):
        PackedStore(".")
    zarr.create_group(tmp_path / "theirs" / "weights.zarr")
    assert not is_packed(tmp_path / "theirs")


@pytest.mark.parametrize(
    "kind", ["no JSON", "half packed", "half packed and renamed", "the group's document is a FIFO", "a newer layout"]
)
def test_what_is_wrong_is_still_recognised(copy: Path, kind: str) -> None:
    WRONG[kind].change(copy)
    assert is_packed(copy)


# Verifying


def test_verify_tells_its_progress(packed_once: Path) -> None:
    told: list[tuple[int, int]] = []
    assert verify(packed_once, progress=lambda done, whole: told.append((done, whole))) == ()
    nbytes = PLAN_OF_SAMPLE.nbytes
    assert told == sorted(told)
    assert told[-1] == (nbytes, nbytes)
    assert len(told) > 3


def test_verify_names_everything_at_once(copy: Path) -> None:
    group = copy / "weights.zarr"
    for at in (WINDOW + 1, 2 * WINDOW + 1):
        flip(group / "unit-00000" / "c" / "0", at)
    os.truncate(group / "unit-00001" / "c" / "0", 4096)
    (group / "unit-00002" / "zarr.json").unlink()
    (copy / "config.json").write_bytes(b"{}")
    (copy / "extra" / "chat.jinja").unlink()
    (group / "unit-00003").mkdir()
    (group / "unit-00000" / "c" / "1").touch()
    (copy / "README.md").touch()  # whoever publishes a store may add to it
    told: list[int] = []
    lines = verify(copy, progress=lambda done, whole: told.append(done))
    expected = [
        f"'embed.weight' in .*unit-00000.*at byte {WINDOW} ",
        f"'embed.weight' in .*unit-00000.*at byte {2 * WINDOW} ",
        "unit-00001.* 4096 bytes, 16384 were written",
        "unit-00002/zarr.json' is missing",
        "config.json' has 2 bytes",
        "chat.jinja' is missing",
        "unit-00003' does not belong",
        "unit-00000/c/1' does not belong",
    ]
    for line, match in zip(lines, expected, strict=True):
        with pytest.raises(StoreError, match=match):
            raise StoreError(line)
    assert told[-1] == PLAN_OF_SAMPLE.nbytes


def test_verify_does_not_follow_links_among_the_weights(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").touch()
    (copy / "weights.zarr" / "link").symlink_to(tmp_path / "deep")
    (line,) = verify(copy)
    assert "weights.zarr/link' does not belong" in line


def test_verify_goes_on_behind_a_read_that_fails(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.preadv

    def broken(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if len(buffers[0]) > 1 << 20:
            raise OSError(errno.EIO, "Input/output error")
        return plain(fd, buffers, offset, *flags)

    flip(copy / "weights.zarr" / "unit-00001" / "c" / "0", 0)
    monkeypatch.setattr(os, "preadv", broken)
    lines = verify(copy)
    assert len(lines) == 2
    assert "Input/output error" in lines[0]
    assert "unit-00001" in lines[1]


def test_verify_ends_when_its_progress_fails(packed_once: Path) -> None:
    def stop(done: int, whole: int) -> NoReturn:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        verify(packed_once, progress=stop)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


def test_group_changes_are_signed(copy: Path) -> None:
    """The hostile stores are refused for what is wrong with them, and not for their checksum."""
    group(lambda mine: mine["source"].update(revision="2"))(copy)
    store = PackedStore(copy)
    assert store.manifest.source["revision"] == "2"
    store.close()
