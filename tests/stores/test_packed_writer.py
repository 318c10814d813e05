"""Packing: whole or not there, gone on with after a kill, by one process, on disks that fill up and fail."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest
import torch
import zarr

from tests.stores.packed_hostile import (
    FILES,
    UNITS,
    fill,
    pack,
    plan_of,
    sample,
    without_errors,
)
from tierstore.contracts import Buffer
from tierstore.errors import (
    StoreBusyError,
    StoreError,
    StoreFormatError,
    StoreFullError,
    StoreIncompleteError,
    StoreMismatchError,
)
from tierstore.stores import streamed
from tierstore.stores.manifest import (
    Manifest,
    PackedUnit,
    parse_manifest,
    text_crc32c,
)
from tierstore.stores.packed import PackedStore, is_packed
from tierstore.stores.packed_files import PLAN
from tierstore.stores.packed_writer import PackedWriter, find_packed
from tierstore.stores.streamed import StreamedFile
from tierstore.stores.verifying import verify
from tierstore.testing.store_contract import as_buffer, open_descriptors

TENSORS = sample()
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
def copy(packed_once: Path, out: Path) -> Path:
    """A whole store of the test's own."""
    shutil.copytree(packed_once, out)
    return out


@pytest.mark.parametrize("refusal", ["none", "no O_DIRECT", "granted and refused", "few bytes at a time"])
def test_a_streamed_file_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    plain, direct = os.pwrite, 0

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EINVAL, "Invalid argument")

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        nonlocal direct
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            direct += 1
            if refusal == "granted and refused":
                refuse()
        return plain(fd, view[:4096] if refusal == "few bytes at a time" else view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    if refusal == "no O_DIRECT":
        monkeypatch.setattr(fcntl, "fcntl", lambda fd, what, *flag: refuse() if flag else 0)
    monkeypatch.setattr(streamed, "CHUNK", 4 * 8192)
    file = StreamedFile(tmp_path / "x", window_nbytes=8192)
    wanted = bytearray()
    random = Random(3)
    for size in (0, 5, 4096, 100_000, 32768, 1):
        data = random.randbytes(size)
        file.write(as_buffer(data))
        wanted += data
        assert file.nbytes == len(wanted)
        file.pad()
        wanted += bytes(-len(wanted) % 4096)
    file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == wanted
    windows = [wanted[at : at + 8192] for at in range(0, len(wanted), 8192)]
    assert file.crcs == [text_crc32c(bytes(window)) for window in windows]
    assert direct or refusal == "no O_DIRECT"


@pytest.fixture
def half(out: Path) -> Path:
    """Units 0 and 2 of the sample are whole, unit 1 is not."""
    with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
        assert writer.left == (0, 1, 2)
        fill(writer, TENSORS, PLAN_OF_SAMPLE, (2, 0))
    return out


def finish(out: Path, plan: Manifest = PLAN_OF_SAMPLE, tensors: Mapping[str, Any] = TENSORS) -> None:
    with PackedWriter(out, plan) as writer:
        fill(writer, tensors, plan)
        for name, raw in FILES.items():
            writer.add_file(name, raw)
        writer.finish()


def test_packing_goes_on_where_it_stopped(half: Path, packed_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    plain = StreamedFile.write

    def write(file: StreamedFile, data: Buffer) -> None:
        written.append(data.numel())
        plain(file, data)

    monkeypatch.setattr(StreamedFile, "write", write)
    with PackedWriter(half, PLAN_OF_SAMPLE) as writer:
        assert writer.left == (1,)
    finish(half)
    assert sum(written) == sum(spec.nbytes for spec, _ in PLAN_OF_SAMPLE.units[1].placed)
    assert content(half) == content(packed_once)
    assert os.listdir(half.parent) == ["OUT"]


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(unit: Path) -> None:
        shutil.rmtree(unit)
        make(unit)

    return apply


def fifo_of_data(unit: Path) -> None:
    (unit / "c" / "0").unlink()
    os.mkfifo(unit / "c" / "0")


@pytest.mark.parametrize(
    "damage",
    [
        lambda unit: os.truncate(unit / "c" / "0", 4096),
        lambda unit: (unit / "c" / "0").unlink(),
        lambda unit: os.truncate(unit / "zarr.json", 100),
        lambda unit: (unit / "zarr.json").unlink(),
        lambda unit: shutil.copy(unit.parent / "unit-00002" / "zarr.json", unit / "zarr.json"),
        replaced(Path.touch),
        replaced(os.mkfifo),
        replaced(lambda unit: unit.symlink_to("unit-00002")),
        fifo_of_data,
    ],
)
def test_a_damaged_unit_is_packed_again(half: Path, packed_once: Path, damage: Callable[[Path], object]) -> None:
    group = half.with_name("OUT.part") / "store" / "weights.zarr"
    damage(group / "unit-00000")
    (group.parent.parent / "unit").mkdir()
    (group.parent.parent / "unit" / "rest").touch()
    finish(half)
    assert content(half) == content(packed_once)


def test_an_empty_folder_may_be_packed_into(out: Path, packed_once: Path) -> None:
    out.mkdir()
    finish(out)
    assert content(out) == content(packed_once)


def test_folders_are_made_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    finish(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a" / "b" / "config.json").exists()
    assert sorted(os.listdir(tmp_path / "a")) == ["b"]


def test_what_is_packed_already_is_found(copy: Path) -> None:
    before = content(copy)
    found = find_packed(copy, PLAN_OF_SAMPLE)
    assert found is not None
    assert without_errors(found) == PLAN_OF_SAMPLE
    with pytest.raises(StoreError, match="is packed already"):
        PackedWriter(copy, PLAN_OF_SAMPLE)
    assert find_packed(copy.with_name("nothing"), PLAN_OF_SAMPLE) is None
    assert content(copy) == before
    assert os.listdir(copy.parent) == ["OUT"]


def with_format(name: str) -> Manifest:
    """The plan with the second packed tensor in another format."""
    units = list(PLAN_OF_SAMPLE.units)
    units[2] = replace(units[2], tensors=(replace(units[2].tensors[0], format=name), *units[2].tensors[1:]))
    return replace(PLAN_OF_SAMPLE, units=tuple(units))


OTHER_PLANS = {
    "revision is '1', now '2'": replace(PLAN_OF_SAMPLE, source={"checkpoint": "tiny", "revision": "2"}),
    "seed is None, now '1'": replace(PLAN_OF_SAMPLE, source={**PLAN_OF_SAMPLE.source, "seed": "1"}),
    "default format 'int4', now 'int8'": replace(PLAN_OF_SAMPLE, default_format="int8"),
    "'layers.1.q.weight' in format 'int4', now 'int8'": with_format("int8"),
    "'count' in format 'keep', now None": replace(
        PLAN_OF_SAMPLE,
        units=(*PLAN_OF_SAMPLE.units[:2], PackedUnit(PLAN_OF_SAMPLE.units[2].tensors[:1])),
    ),
    "into other units": replace(
        PLAN_OF_SAMPLE,
        units=(PLAN_OF_SAMPLE.units[0], PackedUnit(PLAN_OF_SAMPLE.units[1].tensors + PLAN_OF_SAMPLE.units[2].tensors)),
    ),
}


@pytest.mark.parametrize("why", OTHER_PLANS)
def test_another_packing_is_not_touched(half: Path, copy_of_whole: Path, why: str) -> None:
    for out, place in ((half, half.with_name("OUT.part")), (copy_of_whole, copy_of_whole)):
        before = content(place)
        with pytest.raises(StoreMismatchError, match=rf"{why}.*delete") as caught:
            PackedWriter(out, OTHER_PLANS[why])
        assert str(place) in str(caught.value)
        assert content(place).keys() | {".tierstore.lock"} == before.keys() | {".tierstore.lock"}
    finish(half)


@pytest.fixture
def copy_of_whole(packed_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_once, tmp_path / "whole"))


def test_what_was_written_by_another_release_may_be_finished(half: Path) -> None:
    finish(half, replace(PLAN_OF_SAMPLE, written_by="a later one"))
    assert parse_manifest((half / "weights.zarr" / "zarr.json").read_bytes(), "it").written_by == "a later one"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda out: (out.mkdir(), (out / "thesis.txt").touch()), "holds other things"),
        (lambda out: out.touch(), "cannot be made by a rename"),
        (lambda out: (out.with_name("OUT.part").mkdir(), (out.with_name("OUT.part") / "x").touch()), "no packing"),
        (lambda out: out.with_name("OUT.part").touch(), "no packing"),
        (lambda out: out.with_name("OUT.part").symlink_to(out.parent), "no packing"),
        (lambda out: zarr.create_group(out / "weights.zarr"), "not the group document of a packed store"),
    ],
)
def test_what_is_not_ours_is_not_touched(out: Path, make: Callable[[Path], object], match: str) -> None:
    make(out)
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(StoreError, match=match):
        PackedWriter(out, PLAN_OF_SAMPLE)
    assert sorted(out.parent.rglob("*")) == before


def test_a_folder_that_may_not_be_written() -> None:
    with pytest.raises(StoreError, match="cannot pack into"):
        PackedWriter("/proc/self/OUT", PLAN_OF_SAMPLE)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("name", ["store", "store/weights.zarr"])
def test_links_in_the_unfinished_folder_are_not_followed(half: Path, tmp_path: Path, name: str, begun: bool) -> None:
    if not begun:
        (half.with_name("OUT.part") / PLAN).unlink()
    place = half.with_name("OUT.part") / name
    place.rename(tmp_path / "precious")
    place.symlink_to(tmp_path / "precious")
    before = sorted((tmp_path / "precious").rglob("*"))
    with pytest.raises(StoreMismatchError, match="is a link"):
        PackedWriter(half, PLAN_OF_SAMPLE)
    assert sorted((tmp_path / "precious").rglob("*")) == before


@pytest.mark.parametrize("text", [b"", b"{", b"[]", None])
def test_a_damaged_note_of_the_plan_is_named(half: Path, text: bytes | None) -> None:
    note = half.with_name("OUT.part") / PLAN
    note.unlink()
    if text is None:
        os.mkfifo(note)
    else:
        note.write_bytes(text)
    with pytest.raises(StoreMismatchError, match=r"packing.json.*delete .*OUT.part' to begin anew"):
        PackedWriter(half, PLAN_OF_SAMPLE)


def test_a_plan_that_no_store_can_have(out: Path) -> None:
    twice = replace(PLAN_OF_SAMPLE, units=(PLAN_OF_SAMPLE.units[0], PLAN_OF_SAMPLE.units[0]))
    with pytest.raises(StoreFormatError, match=r"'embed.weight' twice"):
        PackedWriter(out, twice)
    assert os.listdir(out.parent) == []


def test_one_process_packs(out: Path) -> None:
    with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
        fill(writer, TENSORS, PLAN_OF_SAMPLE, (1,))
        for plan in (PLAN_OF_SAMPLE, OTHER_PLANS["into other units"]):
            with pytest.raises(StoreBusyError, match=f"process {os.getpid()}.*wait"):
                PackedWriter(out, plan)
        fill(writer, TENSORS, PLAN_OF_SAMPLE)
        writer.finish()
    with pytest.raises(StoreError, match="packed already"):
        PackedWriter(out, PLAN_OF_SAMPLE)


def test_of_many_at_once_one_packs(out: Path, packed_once: Path) -> None:
    start = threading.Barrier(8)

    def run(_: int) -> str:
        start.wait()
        try:
            finish(out)
        except StoreBusyError:
            return "busy"
        except StoreError as error:
            return str(error)
        return "packed"

    with ThreadPoolExecutor(8) as threads:
        ended = list(threads.map(run, range(8)))
    assert ended.count("packed") == 1
    for said in set(ended) - {"packed", "busy"}:
        assert "packed already" in said or "No such file" in said  # it was just renamed
    assert content(out) == content(packed_once)


def test_wrong_tensors_are_refused_and_the_unit_starts_anew(out: Path, packed_once: Path) -> None:
    names = [entry.name for entry in PLAN_OF_SAMPLE.units[1].tensors]
    good: Any = TENSORS[names[0]]
    wrong: list[tuple[str, Any, str]] = [
        (names[1], TENSORS[names[1]], "'layers.0.q.weight' is next"),
        ("unheard", TENSORS[names[1]], "'layers.0.q.weight' is next"),
        (names[0], good["codes"], "in format 'int4' is stored as"),
        (names[0], {"codes": good["codes"]}, "in format 'int4' is stored as"),
        (names[0], {**good, "more": good["codes"]}, "in format 'int4' is stored as"),
        (names[0], {**good, "codes": good["codes"].to(torch.int8)}, "is int8 of shape"),
        (names[0], {**good, "codes": good["codes"].t()}, r"of shape \(100, 64\)"),
        (names[0], {**good, "codes": good["codes"].to("meta")}, "on meta"),
        (names[0], {**good, "codes": good["codes"].to_sparse()}, "torch.sparse"),
    ]
    with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
        for name, data, match in wrong:
            with pytest.raises(StoreError, match=match), writer.unit(1) as unit:
                unit.add(name, data)
        for error in (-1.0, float("nan"), float("inf")):
            with pytest.raises(StoreError, match="relative error"), writer.unit(1) as unit:
                unit.add(names[0], good, relative_error=error)
        with pytest.raises(StoreError, match=r"'layers.0.norm' of .* was not given"), writer.unit(1) as unit:
            unit.add(names[0], good)
        with pytest.raises(ZeroDivisionError), writer.unit(1) as unit:
            raise ZeroDivisionError
        with pytest.raises(FileNotFoundError, match="mine"), writer.unit(1) as unit:
            raise FileNotFoundError("mine")
        with writer.unit(2) as unit:
            unit.add("layers.1.q.weight", TENSORS["layers.1.q.weight"], relative_error=2.125)
            with pytest.raises(StoreError, match="in format 'keep' is stored as"):
                unit.add("count", {"codes": torch.tensor(7)})
            unit.add("count", torch.tensor(7))
            with pytest.raises(StoreError, match="None is next"):
                unit.add("count", torch.tensor(7))
        assert writer.left == (0, 1)
        with pytest.raises(StoreError, match="unit 2 is not among those left"), writer.unit(2):
            pass
        with pytest.raises(StoreError, match=r"2 units of .* are left, unit 0 first"):
            writer.finish()
    finish(out)
    assert content(out) == content(packed_once)


def test_units_are_written_one_at_a_time(out: Path) -> None:
    with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
        with pytest.raises(StoreError, match="File exists"), writer.unit(0), writer.unit(1):
            pass
        assert writer.left == (0, 1, 2)


def test_a_closed_writer_writes_nothing(out: Path) -> None:
    writer = PackedWriter(out, PLAN_OF_SAMPLE)
    fill(writer, TENSORS, PLAN_OF_SAMPLE, (0,))
    for _ in range(2):
        writer.close()
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(StoreError, match="is closed"), writer.unit(1):
        pass
    with pytest.raises(StoreError, match="is closed"):
        writer.add_file("config.json", b"")
    assert sorted(out.parent.rglob("*")) == before


def test_closed_before_a_unit_was_whole_nothing_is_left(out: Path) -> None:
    PackedWriter(out, PLAN_OF_SAMPLE).close()
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize(
    "name", ["../x", "/x", "", "a//b", "a/./b", "weights.zarr", "weights.zarr/x", "a\0b", "x" * 256]
)
def test_files_stay_in_the_folder(out: Path, name: str) -> None:
    with PackedWriter(out, PLAN_OF_SAMPLE) as writer, pytest.raises(StoreFormatError, match="stays in the folder"):
        writer.add_file(name, b"")
    assert os.listdir(out.parent) == []


def test_a_file_is_replaced(out: Path) -> None:
    with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
        fill(writer, TENSORS, PLAN_OF_SAMPLE)
        for raw in (b"old and long", b"new"):
            writer.add_file("a/b/c.bin", raw)
        with pytest.raises(StoreError, match="cannot write 'a/b'"):
            writer.add_file("a/b", b"")
        manifest = writer.finish()
    assert list(manifest.files) == ["a/b/c.bin"]
    assert (out / "a" / "b" / "c.bin").read_bytes() == b"new"
    assert verify(out) == ()


def test_a_folder_that_fills_up_while_packing_is_kept(out: Path) -> None:
    with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
        fill(writer, TENSORS, PLAN_OF_SAMPLE)
        out.mkdir()
        (out / "mine").touch()
        with pytest.raises(StoreError, match="not empty"):
            writer.finish()
    assert os.listdir(out) == ["mine"]
    (out / "mine").unlink()
    finish(out)
    assert verify(out) == ()


# Full and failing disks


def test_a_disk_without_room_is_named_before_anything_is_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = PLAN_OF_SAMPLE.nbytes

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(StoreFullError, match=r"3 units of .*OUT' need 2.75 MiB on disk, 2.70 MiB are free"):
        PackedWriter(out, PLAN_OF_SAMPLE)
    assert os.listdir(out.parent) == []


def test_only_what_is_left_needs_room(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = PLAN_OF_SAMPLE.units[1].nbytes + 20_000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    finish(half)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("broken", ["pwrite", "fsync", "mkdir", "rename", "replace"])
def test_a_disk_that_fails_anywhere_loses_nothing(
    out: Path, packed_once: Path, monkeypatch: pytest.MonkeyPatch, broken: str, code: int
) -> None:
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    plain = getattr(os, broken)
    for call in range(100):
        left = call

        def fail(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(code, os.strerror(code))
            return plain(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, broken, fail)
            said: StoreError | None = None
            try:
                finish(out)
            except StoreError as error:
                said = error
        ended = said is None
        if said is not None:
            assert type(said) is (StoreError if code == errno.EIO else StoreFullError)
            assert os.strerror(code) in str(said)
        whole = {path.name for path in out.with_name("OUT.part").glob("store/weights.zarr/unit-*")}
        assert open_descriptors() == descriptors
        assert set(threading.enumerate()) == threads
        if not ended and not out.exists():
            with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
                assert {f"unit-{number:05d}" for number in range(3)} - {f"unit-{n:05d}" for n in writer.left} == whole
        if find_packed(out, PLAN_OF_SAMPLE) is None:
            finish(out)
        assert content(out) == content(packed_once)
        assert os.listdir(out.parent) == ["OUT"]
        shutil.rmtree(out)
        if left >= 0:
            break
        if ended:
            continue
    assert left >= 0
    assert call >= 2


def test_a_limit_of_file_size_is_a_full_disk(out: Path, packed_once: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        full = pytest.raises(StoreFullError, match=r"unit-00000 of .*File too large.*what is whole stays")
        with full, PackedWriter(out, PLAN_OF_SAMPLE) as writer:
            fill(writer, TENSORS, PLAN_OF_SAMPLE, (2, 1, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
        assert writer.left == (0,)
    finish(out)
    assert content(out) == content(packed_once)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_full_disk(tmp_path: Path, packed_once: Path) -> None:
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        with pytest.raises(StoreMismatchError, match="mount point"):
            PackedWriter(tmp_path / "disk", PLAN_OF_SAMPLE)
        out, ballast = tmp_path / "disk" / "OUT", tmp_path / "disk" / "ballast"
        with PackedWriter(out, PLAN_OF_SAMPLE) as writer:
            fill(writer, TENSORS, PLAN_OF_SAMPLE, (1,))
            ballast.write_bytes(bytes(1 << 20))
            with pytest.raises(StoreFullError, match="No space left"):
                fill(writer, TENSORS, PLAN_OF_SAMPLE)
            assert writer.left == (0, 2)
        with pytest.raises(StoreFullError, match="are free"):
            PackedWriter(out, PLAN_OF_SAMPLE)
        ballast.unlink()
        finish(out)
        assert content(out) == content(packed_once)
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    program = Path(__file__).with_name("packing_killed.py")
    ended = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 25


def test_a_half_packed_folder_is_no_store(half: Path) -> None:
    part = half.with_name("OUT.part")
    for path, match in ((half, "is half packed, in"), (part, "is half packed: pack again into .*OUT'"),
                        (part / "store", "was not packed or copied to the end")):  # fmt: skip
        assert is_packed(path)
        for use in (PackedStore, verify):
            with pytest.raises(StoreIncompleteError, match=match):
                use(path)
