"""What a spill store's folder holds on disk, whose it is, and how it is taken away again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tierstore.contracts import Buffer
from tierstore.errors import (
    StoreBusyError,
    StoreError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
)
from tierstore.stores.durable import sync, write_data, write_text
from tierstore.stores.json_files import read_bytes, strict_json
from tierstore.stores.reader import open_regular
from tierstore.stores.workers import buffer_address
from tierstore.stores.zarr_documents import array_document, group_document
from tierstore.tensors import ITEMSIZE, TensorSpec

LOCK = ".tierstore.lock"
GROUP = "tensors.zarr"
PARTIAL = "tensors.zarr.partial"
"""The group's name while it is not whole: being written, or being deleted."""
NEW = ".new"
"""Ends the name of a file that will replace another one."""
LAYOUT = 1
_MAX_DOCUMENT = 64 << 20


Source = Buffer | Callable[[], Buffer]
"""A tensor's bytes in host memory, or what makes them when it is their turn, so that not all are needed at once."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One tensor on disk. ``crcs``: its bytes have one of these CRC32C (several while they are being replaced)."""

    spec: TensorSpec
    crcs: tuple[int, ...] = (0,)

    @property
    def folder(self) -> str:
        """A file name for the tensor's name: reversible, or for a long one unique; never leaves its folder."""
        name = quote(self.spec.name, safe="", errors="surrogatepass").replace("~", "%7E")
        if len(name) > 200:
            digest = hashlib.sha256(self.spec.name.encode("utf-8", "surrogatepass")).hexdigest()
            return f"{name[:120]}~{digest}"
        if name.startswith((".", "_")) or name == "zarr.json":  # what the filesystem or Zarr keeps for itself
            return f"%{ord(name[0]):02X}{name[1:]}"
        return name or "%"

    def document(self) -> str:
        """The array's ``zarr.json``."""
        mine = {
            "name": self.spec.name,
            "dtype": self.spec.dtype,
            "shape": list(self.spec.shape),
            "crc32c": [f"{crc:08x}" for crc in self.crcs],
        }
        return array_document(self.spec.nbytes, mine)


@dataclass(frozen=True, slots=True)
class Stored:
    """A whole group: which model it is of, and its tensors."""

    fingerprint: str
    arrays: tuple[StoredArray, ...]

    def document(self) -> str:
        """The group's ``zarr.json``, written last."""
        folders = [array.folder for array in self.arrays]
        mine = {"layout": LAYOUT, "fingerprint": self.fingerprint, "complete": True, "arrays": folders}
        return group_document(mine)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        data = sum(array.spec.nbytes + len(array.document()) for array in self.arrays)
        return data + len(self.document())


class FolderLock:
    """The right of one live process to a folder. Raises ``StoreBusyError`` when another has it."""

    def __init__(self, root: Path) -> None:
        self._fd = -1
        self.path = root / LOCK
        self.made = not os.path.lexists(self.path)
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(self.path) and os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    break
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace") or "unknown"
                os.close(fd)
                raise StoreBusyError(
                    f"the store folder {str(root)!r} is in use by process {holder}: "
                    "close that session, or give another folder as store="
                ) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its last holder deleted it between our open and our lock
        self._fd = fd
        with suppress(OSError):  # only to name us to others: a full disk is no reason to fail
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)

    @property
    def held(self) -> bool:
        """Whether the lock is still ours."""
        return self._fd >= 0

    def release(self, *, delete: bool = False) -> None:
        """Let others have the folder. Idempotent."""
        if self._fd >= 0:
            if delete:
                self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    __del__ = release


def claim(root: Path) -> bool:
    """Make ``root`` where it is missing (True then); ``StoreMismatchError`` where it holds only other things."""
    if not os.path.lexists(root):
        root.mkdir(parents=True)
        return True
    if not root.is_dir():
        raise StoreMismatchError(f"{str(root)!r} is no folder: give a folder as store=")
    names = os.listdir(root)
    if names and not {LOCK, GROUP, PARTIAL} & set(names):
        raise StoreMismatchError(
            f"the folder {str(root)!r} holds {len(names)} entries such as {sorted(names)[0]!r} and no store of ours: "
            "nothing was touched: give an empty or a new folder as store="
        )
    return False


def find_stored(root: Path, fingerprint: str | None) -> Stored | None:
    """The whole group below ``root``, or None. ``fingerprint=None`` takes a store of any model.

    Raises ``StoreIncompleteError``, ``StoreMismatchError``, ``StoreFormatError``."""
    if os.path.lexists(root / PARTIAL):
        raise StoreIncompleteError(
            f"{str(root / PARTIAL)!r} was left half-written, its process ended early: delete that folder and try again"
        )
    group = root / GROUP
    if not os.path.lexists(group):
        return None
    stored = _read_stored(group)
    if fingerprint not in (None, stored.fingerprint):
        raise StoreMismatchError(
            f"the store in {str(group)!r} is of model {stored.fingerprint!r}, this is {fingerprint!r}: "
            "give another folder as store=, or delete that one"
        )
    return stored


def write_group(root: Path, stored: Stored, sources: Sequence[Source]) -> Stored:
    """Write a whole group: its last steps are the manifest and its name."""
    group = root / PARTIAL
    group.mkdir()
    arrays: list[StoredArray] = []
    written: list[Path] = []
    for array, source in zip(stored.arrays, sources, strict=True):
        folder = group / array.folder
        (folder / "c").mkdir(parents=True)
        data = source() if callable(source) else source
        buffer_address(data, array.spec.nbytes)
        arrays.append(replace(array, crcs=(write_data(folder / "c" / "0", data),)))
        write_text(folder / "zarr.json", arrays[-1].document())
        written += (folder / "c" / "0", folder / "c", folder / "zarr.json", folder)
    whole = replace(stored, arrays=tuple(arrays))
    sync(written)
    write_text(group / "zarr.json", whole.document())
    sync([group / "zarr.json", group])
    os.rename(group, root / GROUP)
    sync([root, root.parent])
    return whole


def delete_unfinished(group: Path, arrays: Iterable[StoredArray]) -> None:
    """Delete what a killed process was about to put in the place of another file."""
    for array in arrays:
        for file in (Path("c") / "0", Path("zarr.json")):
            (group / array.folder / f"{file}{NEW}").unlink(missing_ok=True)


def delete_group(root: Path, arrays: Iterable[StoredArray]) -> None:
    """Delete the group and nothing else: files that are not ours stay, with the folders that hold them."""
    group = root / PARTIAL
    if os.path.lexists(root / GROUP):
        os.rename(root / GROUP, group)  # so that a half-deleted one does not look whole
    for array in arrays:
        _delete_files(group / array.folder / "c", "0")
        _delete_files(group / array.folder, "zarr.json")
    _delete_files(group, "zarr.json")


def _delete_files(folder: Path, name: str) -> None:
    if folder.is_symlink() or folder.parent.is_symlink():
        return
    for file in (name, name + NEW):
        with suppress(FileNotFoundError, NotADirectoryError):
            (folder / file).unlink()
    with suppress(OSError):  # missing, or someone's files are in it
        folder.rmdir()


def _read_stored(group: Path) -> Stored:
    mine = _attributes(group)
    match mine:
        case {"layout": 1, "fingerprint": str(fingerprint), "complete": True, "arrays": list(folders)}:
            pass
        case {"complete": False}:
            raise StoreIncompleteError(f"{str(group)!r} was left half-written: delete that folder and try again")
        case _:
            raise StoreFormatError(f"the manifest in {str(group)!r} is damaged: delete that folder and try again")
    arrays = [_read_array(group, folder) for folder in folders]
    if len(set(folders)) != len(folders):
        raise StoreFormatError(f"the manifest in {str(group)!r} names a tensor twice: delete that folder and try again")
    return Stored(fingerprint, tuple(arrays))


def _read_array(group: Path, folder: object) -> StoredArray:
    # A folder's name comes from the manifest: it is used only when it is the name of one folder in this group.
    if not isinstance(folder, str) or folder in ("", ".", "..") or "/" in folder or "\0" in folder:
        raise StoreFormatError(f"the manifest in {str(group)!r} names the array {folder!r}, which leaves the folder")
    for inner in (group / folder, group / folder / "c"):
        if not os.path.lexists(inner) or not stat.S_ISDIR(os.lstat(inner).st_mode):
            raise StoreFormatError(f"{str(inner)!r} is no folder: delete {str(group)!r} and try again")
    document = _document(group / folder)
    match document:
        case {
            "attributes": {
                "tierstore": {"name": str(name), "dtype": str(dtype), "shape": list(shape), "crc32c": list(crcs)}
            }
        } if dtype in ITEMSIZE and all(type(size) is int and size >= 0 for size in shape):
            with suppress(ValueError, TypeError):
                array = StoredArray(TensorSpec(name, dtype, tuple(shape)), tuple(int(crc, 16) for crc in crcs))
                # Written again it must be the same: then every other number in it is right too.
                if array.folder == folder and array.crcs and json.loads(array.document()) == document:
                    return array
    raise StoreFormatError(
        f"{str(group / folder / 'zarr.json')!r} is damaged or of another layout: delete {str(group)!r} and try again"
    )


def _attributes(group: Path) -> Any:
    if group.is_symlink() or not (group / "zarr.json").is_file():
        raise StoreMismatchError(
            f"{str(group)!r} has no zarr.json, so it is no store of ours: nothing was touched: give another store="
        )
    document = _document(group)
    match document:
        case {"node_type": "group", "zarr_format": 3, "attributes": {"tierstore": dict(mine)}}:
            return mine
    raise StoreMismatchError(
        f"{str(group)!r} is a Zarr group of someone else: nothing was touched: give another folder as store="
    )


def _document(folder: Path) -> object:
    path = folder / "zarr.json"
    fd = open_regular(path)
    try:
        raw = read_bytes(fd, _MAX_DOCUMENT + 1, path)
    finally:
        os.close(fd)
    if len(raw) > _MAX_DOCUMENT:
        raise StoreFormatError(f"{str(path)!r} is longer than {_MAX_DOCUMENT} bytes: delete {str(folder)!r}")
    return strict_json(raw, repr(str(path)))


def unique_arrays(specs: Sequence[TensorSpec], where: Path) -> tuple[StoredArray, ...]:
    """An array for each spec; ``StoreError`` when a name comes twice."""
    arrays = {spec.name: StoredArray(spec) for spec in specs}
    if len(arrays) != len(specs):
        names = [spec.name for spec in specs]
        twice = next(name for name in names if names.count(name) > 1)
        raise StoreError(f"tensor {twice!r} comes twice for {str(where)!r}: names must differ")
    return tuple(arrays.values())
