"""The spill store: whole or absent, bounded, one owner, readable by any Zarr reader, and gone when removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import example, given
from hypothesis import strategies as st

from tierstore.contracts import ReadRequest
from tierstore.errors import (
    ChecksumError,
    StoreBusyError,
    StoreError,
    StoreFormatError,
    StoreFullError,
    StoreIncompleteError,
    StoreMismatchError,
)
from tierstore.extents import Extent
from tierstore.stores import folders, reader
from tierstore.stores.folders import GROUP, LOCK, PARTIAL, StoredArray
from tierstore.stores.zarr import SpillStore
from tierstore.tensors import TensorSpec
from tierstore.testing.store_contract import open_descriptors, read_tensor

TENSORS = {
    "layer.0": torch.arange(5000, dtype=torch.int64).view(torch.uint8),
    "a/../b": torch.arange(7, dtype=torch.uint8),
    "empty": torch.empty(0, dtype=torch.uint8),
}


def create(root: Path, **options: Any) -> SpillStore:
    return SpillStore.create(root, TENSORS.items(), **{"fingerprint": "model", **options})


def bytes_below(root: Path) -> int:
    """All but the lock, whose holder writes its number there."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.name != LOCK)


def names_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[SpillStore]:
    made = create(root)
    yield made
    made.close()


def test_zarr_reads_the_same_bytes(store: SpillStore, root: Path) -> None:
    store.write("a/../b", torch.full((7,), 9, dtype=torch.uint8))
    group = zarr.open_group(root / GROUP, mode="r")
    found = {}
    for _, array in group.arrays():
        assert isinstance(array, zarr.Array)
        mine = array.attrs["tierstore"]
        assert isinstance(mine, dict)
        found[str(mine["name"])] = np.asarray(array[:])
    assert found.keys() == TENSORS.keys()
    for name, data in (TENSORS | {"a/../b": torch.full((7,), 9, dtype=torch.uint8)}).items():
        np.testing.assert_array_equal(found[name], data.numpy())


@pytest.mark.parametrize("nbytes", [0, 1, 5000])
def test_documents_are_those_that_zarr_writes(tmp_path: Path, nbytes: int) -> None:
    theirs = zarr.create_group(tmp_path / "theirs")
    theirs.create_array(
        "w", shape=(nbytes,), chunks=(max(nbytes, 1),), dtype="uint8", compressors=None, filters=None, fill_value=0
    )
    ours = json.loads(StoredArray(TensorSpec("w", "uint8", (nbytes,))).document())
    assert ours.pop("attributes").keys() == {"tierstore"}
    expected = json.loads((tmp_path / "theirs" / "w" / "zarr.json").read_text())
    assert expected.pop("attributes") == {}
    assert ours == expected


@given(st.text(st.characters()), st.text(st.characters()))
@example("", "%")
@example("..", ".")
@example("zarr.json", "__x")
@example("/etc/passwd", "~")
@example("x" * 300, "x" * 299 + "y")
@example("a/b", "a%2Fb")
@example("\ud800", "\0")
def test_names_stay_in_the_folder_and_apart(one: str, other: str) -> None:
    names = [StoredArray(TensorSpec(name, "uint8", (1,))).folder for name in (one, other)]
    for name in names:
        assert 0 < len(os.fsencode(name)) <= 255
        assert not name.startswith((".", "__"))
        assert name != "zarr.json"
        assert not {"/", "\0", "\\"} & set(name)
    assert (names[0] == names[1]) == (one == other)


def test_specs_are_kept(root: Path) -> None:
    spec = TensorSpec("w", "bfloat16", (3, 5))
    made = SpillStore.create(root, [(spec, torch.arange(30, dtype=torch.uint8))], fingerprint="model")
    made.close()
    again = SpillStore.open(root)
    assert again.specs["w"] == spec
    assert torch.equal(read_tensor(again, "w"), torch.arange(30, dtype=torch.uint8))
    again.remove()


def test_tensors_may_be_made_one_at_a_time(root: Path) -> None:
    alive: list[int] = []

    def produce(value: int) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            alive.append(value)
            return torch.full((100,), value, dtype=torch.uint8)

        return make

    entries = [(TensorSpec(str(value), "uint8", (100,)), produce(value)) for value in range(3)]
    made = SpillStore.create(root, entries, fingerprint="model")
    assert alive == [0, 1, 2]
    assert torch.equal(read_tensor(made, "2"), torch.full((100,), 2, dtype=torch.uint8))
    made.remove()
    with pytest.raises(StoreError, match="give its TensorSpec"):
        SpillStore.create(root, [("w", produce(0))], fingerprint="model")


def test_it_counts_every_byte(store: SpillStore, root: Path) -> None:
    whole = bytes_below(root)
    assert store.nbytes == store.peak_nbytes == store.written_nbytes == whole
    store.write("layer.0", TENSORS["layer.0"].clone())
    assert store.nbytes == bytes_below(root) == whole
    assert whole + 40_000 <= store.peak_nbytes < whole + 42_000
    assert whole + 40_000 < store.written_nbytes < whole + 42_000
    store.remove()
    assert store.nbytes == 0


def test_the_limit_is_exact(root: Path) -> None:
    made = create(root)
    need = made.nbytes
    made.remove()
    made = create(root, limit_nbytes=need)
    assert made.peak_nbytes == need
    with pytest.raises(StoreFullError, match=rf"allows {need} .*raise Budget.nvme to at least"):
        made.write("layer.0", torch.zeros_like(TENSORS["layer.0"]))
    assert torch.equal(read_tensor(made, "layer.0"), TENSORS["layer.0"])
    assert bytes_below(root) == made.nbytes == made.peak_nbytes == need
    made.remove()
    with pytest.raises(StoreFullError, match=rf"needs {need} bytes .*at least {need}"):
        create(root, limit_nbytes=need - 1)
    assert not root.exists()


def test_a_disk_without_room_is_seen_before_writing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(StoreFullError, match="0 B are free"):
        create(root)
    assert not root.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", range(1, 7))  # the first is the lock's, and may fail
def test_a_disk_that_fails_while_writing_is_left_clean(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    plain, left = os.pwrite, call

    def full(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        return plain(*arguments)

    threads, descriptors = set(threading.enumerate()), open_descriptors()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError) as caught:
        create(root)
    assert type(caught.value) is (StoreError if code == errno.EIO else StoreFullError)
    assert os.strerror(code) in str(caught.value)
    assert not root.exists()
    assert open_descriptors() == descriptors
    assert set(threading.enumerate()) == threads


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        tensors = [(str(n), torch.zeros(300_000, dtype=torch.uint8)) for n in range(3)]
        made = SpillStore.create(tmp_path / "store", tensors, fingerprint="model")
        with pytest.raises(StoreFullError, match="No space left"):
            made.write("0", torch.ones(300_000, dtype=torch.uint8))
        assert torch.equal(read_tensor(made, "0"), tensors[0][1])
        assert bytes_below(tmp_path) == made.nbytes
        made.remove()
        with pytest.raises(StoreFullError, match="are free"):
            SpillStore.create(tmp_path / "store", [*tensors, ("3", tensors[0][1])], fingerprint="model")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("broken", "call"),
    [(name, call) for name, calls in (("pwrite", 3), ("fsync", 6), ("replace", 3)) for call in range(calls)],
)
def test_a_write_that_fails_leaves_old_or_new(
    store: SpillStore, root: Path, monkeypatch: pytest.MonkeyPatch, broken: str, call: int
) -> None:
    plain, left = getattr(os, broken), call

    def fail(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(errno.EIO, "Input/output error")
        return plain(*arguments)

    new = TENSORS["layer.0"] + 1
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(StoreError, match="Input/output error"):
        store.write("layer.0", new)
    monkeypatch.undo()
    one = read_tensor(store, "layer.0")
    assert torch.equal(one, new) or torch.equal(one, TENSORS["layer.0"])
    assert not [name for name in names_below(root) if name.endswith(folders.NEW)]
    assert store.nbytes == bytes_below(root)
    store.close()
    again = SpillStore.open(root)
    assert torch.equal(read_tensor(again, "layer.0"), one)
    again.close()


def test_writes_that_fail_again_and_again_leave_the_old(
    store: SpillStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.replace

    def fail(source: Path, target: Path) -> None:
        if target.name == "0":
            raise OSError(errno.EIO, "Input/output error")
        plain(source, target)

    monkeypatch.setattr(os, "replace", fail)
    for value in range(3):
        with pytest.raises(StoreError, match="Input/output error"):
            store.write("layer.0", torch.full_like(TENSORS["layer.0"], value))
    store.close()
    again = SpillStore.open(root)
    assert torch.equal(read_tensor(again, "layer.0"), TENSORS["layer.0"])
    again.close()


@pytest.mark.parametrize("at", [0, 20_000, 39_999])
@pytest.mark.parametrize("part", [False, True])
def test_a_changed_byte_is_found_at_the_first_read(store: SpillStore, root: Path, at: int, part: bool) -> None:
    with (root / GROUP / "layer.0" / "c" / "0").open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    (piece,) = store.pieces("layer.0")
    extent = Extent(100, 10) if part else piece.extent
    into = torch.empty(extent.nbytes, dtype=torch.uint8)
    for _ in range(2):
        fence = store.read([ReadRequest(piece.file, extent, into)])
        with pytest.raises(ChecksumError, match=r"'layer.0' in .*CRC32C [0-9a-f]{8}, written with [0-9a-f]{8}"):
            fence.wait()
    assert torch.equal(read_tensor(store, "a/../b"), TENSORS["a/../b"])


def test_what_was_written_anew_is_checked_anew(store: SpillStore, root: Path) -> None:
    read_tensor(store, "a/../b")
    store.write("a/../b", torch.zeros(7, dtype=torch.uint8))
    (chunk,) = (root / GROUP).glob("a*b/c/0")
    chunk.write_bytes(b"\1" + bytes(6))
    with pytest.raises(ChecksumError):
        read_tensor(store, "a/../b")


def test_a_tensor_is_checked_once(store: SpillStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read_tensor(store, "layer.0")
    monkeypatch.setattr(SpillStore, "check", lambda *_: pytest.fail("checked again"))
    read_tensor(store, "layer.0")


def test_a_folder_has_one_owner(store: SpillStore, root: Path) -> None:
    for use in (create, SpillStore.open):
        with pytest.raises(StoreBusyError, match=f"in use by process {os.getpid()}"):
            use(root)
    assert torch.equal(read_tensor(store, "layer.0"), TENSORS["layer.0"])
    store.close()
    SpillStore.open(root).close()


def test_a_dropped_store_lets_its_folder_go(root: Path) -> None:
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    made = create(root)
    mine = set(threading.enumerate()) - threads
    del made
    for thread in mine:
        thread.join(60)
        assert not thread.is_alive()
    assert open_descriptors() == descriptors
    SpillStore.open(root).remove()


def test_another_model_keeps_its_store(root: Path) -> None:
    create(root, fingerprint="other").close()
    before = names_below(root)
    for use in (create, SpillStore.open):
        with pytest.raises(StoreMismatchError, match="'other', this is 'model'"):
            use(root, fingerprint="model")
    assert names_below(root) == before
    SpillStore.open(root, fingerprint="other").remove()


def test_leftovers_of_the_same_model_are_replaced(root: Path) -> None:
    SpillStore.create(root, [("gone", torch.zeros(9, dtype=torch.uint8))], fingerprint="model").close()
    made = create(root)
    assert made.specs.keys() == TENSORS.keys()
    assert made.nbytes == bytes_below(root)
    made.remove()


def test_a_half_written_store_is_named(root: Path) -> None:
    create(root).close()
    os.rename(root / GROUP, root / PARTIAL)
    before = names_below(root)
    for use in (create, SpillStore.open):
        with pytest.raises(StoreIncompleteError, match=f"{PARTIAL}' was left half-written.*delete that folder"):
            use(root)
    assert names_below(root) == before


def test_a_folder_of_someone_else_is_not_touched(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    for use in (create, SpillStore.open):
        with pytest.raises(StoreMismatchError, match=r"'thesis.txt'.*nothing was touched"):
            use(root)
    assert names_below(root) == {"thesis.txt"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    with pytest.raises(StoreMismatchError, match="is no folder"):
        create(tmp_path / "store")
    assert (tmp_path / "store").read_text() == "mine"


def test_a_zarr_group_of_someone_else_is_not_touched(root: Path) -> None:
    group = zarr.create_group(root / GROUP)
    group.create_array("w", shape=(3,), dtype="uint8")
    before = names_below(root)
    with pytest.raises(StoreMismatchError, match="someone else: nothing was touched"):
        create(root)
    assert names_below(root) == before


def test_remove_leaves_what_is_not_ours(root: Path) -> None:
    made = create(root)
    (root / "notes.txt").write_text("mine")
    made.close()
    made.remove()
    made.remove()
    assert names_below(root) == {"notes.txt"}


def test_remove_leaves_a_folder_that_was_there(root: Path) -> None:
    root.mkdir()
    create(root).remove()
    assert list(root.iterdir()) == []


def test_nothing_to_open(root: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        SpillStore.open(root)
    assert not root.exists()
    root.mkdir()
    with pytest.raises(StoreError, match="does not exist"):
        SpillStore.open(root)
    assert list(root.iterdir()) == []


def test_more_files_than_may_stay_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "KEPT_OPEN", 2)
    descriptors = open_descriptors()
    made = create(root)
    assert len(open_descriptors() - descriptors) == 1  # the lock
    for value in range(3):
        new = torch.full_like(TENSORS["layer.0"], value)
        made.write("layer.0", new)
        assert torch.equal(read_tensor(made, "layer.0"), new)
    made.remove()
    assert open_descriptors() == descriptors


def test_names_must_differ(root: Path) -> None:
    twice = [("w", TENSORS["a/../b"]), ("w", TENSORS["layer.0"])]
    with pytest.raises(StoreError, match="'w' comes twice"):
        SpillStore.create(root, twice, fingerprint="model")
    assert not root.exists()


def test_a_source_of_another_size_writes_nothing(root: Path) -> None:
    entries: list[tuple[TensorSpec | str, torch.Tensor]] = [("fine", TENSORS["layer.0"])]
    entries.append((TensorSpec("w", "float32", (3,)), torch.zeros(11, dtype=torch.uint8)))
    with pytest.raises(StoreError, match="12 bytes is needed, got 11"):
        SpillStore.create(root, entries, fingerprint="model")
    assert not root.exists()


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        create(Path("/proc/self/store"))


def replaced_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut_short(path: Path) -> None:
    path.write_text(path.read_text()[:-5])


def damaged(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes what the manifest says, given ``attributes.tierstore``."""

    def apply(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document["attributes"]["tierstore"])
        path.write_text(json.dumps(document))

    return apply


DAMAGE: dict[str, tuple[str, Callable[[Path], None], type[StoreError]]] = {
    "group cut short": ("zarr.json", cut_short, StoreFormatError),
    "group is not complete": ("zarr.json", damaged(lambda m: m.update(complete=False)), StoreIncompleteError),
    "another layout": ("zarr.json", damaged(lambda m: m.update(layout=2)), StoreFormatError),
    "arrays are text": ("zarr.json", damaged(lambda m: m.update(arrays="layer.0")), StoreFormatError),
    "an array above": ("zarr.json", damaged(lambda m: m.update(arrays=["../x"])), StoreFormatError),
    "an array is the parent": ("zarr.json", damaged(lambda m: m.update(arrays=[".."])), StoreFormatError),
    "an array is a number": ("zarr.json", damaged(lambda m: m.update(arrays=[1])), StoreFormatError),
    "an array twice": ("zarr.json", damaged(lambda m: m.update(arrays=m["arrays"] * 2)), StoreFormatError),
    "an array is missing": ("zarr.json", damaged(lambda m: m.update(arrays=["none"])), StoreFormatError),
    "array cut short": ("layer.0/zarr.json", cut_short, StoreFormatError),
    "array has another name": ("layer.0/zarr.json", damaged(lambda m: m.update(name="x")), StoreFormatError),
    "array has another size": ("layer.0/zarr.json", damaged(lambda m: m.update(shape=[7])), StoreFormatError),
    "array has no checksum": ("layer.0/zarr.json", damaged(lambda m: m.update(crc32c=[])), StoreFormatError),
    "checksum is a number": ("layer.0/zarr.json", damaged(lambda m: m.update(crc32c=[1])), StoreFormatError),
    "dtype is unknown": ("layer.0/zarr.json", damaged(lambda m: m.update(dtype="x")), StoreFormatError),
    "data cut short": ("layer.0/c/0", lambda path: os.truncate(path, 100), StoreFormatError),
    "data is gone": ("layer.0/c/0", Path.unlink, StoreError),
    "document is a FIFO": ("layer.0/zarr.json", replaced_by_fifo, StoreError),
    "data is a FIFO": ("layer.0/c/0", replaced_by_fifo, StoreError),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_refused_and_kept(kind: str, root: Path) -> None:
    create(root).close()
    where, damage, error = DAMAGE[kind]
    damage(root / GROUP / where)
    before, threads, descriptors = names_below(root), set(threading.enumerate()), open_descriptors()
    with pytest.raises(StoreError) as caught:
        SpillStore.open(root, fingerprint="model")
    assert type(caught.value) is error
    assert str(root) in str(caught.value)
    assert (names_below(root), open_descriptors()) == (before, descriptors)
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("inner", ["layer.0", "layer.0/c"])
def test_links_are_not_followed_out_of_the_store(root: Path, tmp_path: Path, inner: str) -> None:
    create(root).close()
    target = tmp_path / "precious"
    os.rename(root / GROUP / inner, target)
    (root / GROUP / inner).symlink_to(target)
    before = names_below(target)
    with pytest.raises(StoreFormatError, match="is no folder"):
        create(root)
    assert names_below(target) == before


def test_remove_does_not_follow_a_link(root: Path, tmp_path: Path) -> None:
    made = create(root)
    target = tmp_path / "precious"
    os.rename(root / GROUP / "layer.0" / "c", target)
    (root / GROUP / "layer.0" / "c").symlink_to(target)
    made.remove()
    assert names_below(target) == {"0"}


@pytest.mark.parametrize("scenario", ["create", "write"])
def test_killed_at_any_moment(tmp_path: Path, scenario: str) -> None:
    program = Path(__file__).with_name("killed.py")
    ended = subprocess.run(
        [sys.executable, str(program), str(tmp_path), scenario],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 15
