"""The folder ``OUT.part``, in which a packed store is made before it is whole and gets its name.

OUT.part/.tierstore.lock       held by the process that packs
OUT.part/packing.json          the manifest without errors and checksums: what is being packed
OUT.part/unit/                 the unit being written
OUT.part/store/                what becomes OUT by the last rename; a unit appears in it when it is durable
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

from tierstore.errors import StoreBusyError, StoreError, StoreMismatchError
from tierstore.stores.durable import store_errors, sync
from tierstore.stores.folders import LOCK, FolderLock
from tierstore.stores.manifest import Manifest, PackedUnit, parse_manifest, text_crc32c, unit_name
from tierstore.stores.packed_files import DATA, GROUP, PLAN, part_of, read_file, read_unit

_NEW = "new"


class Unfinished:
    """The right of one process to the folder ``path``, in which ``plan`` is packed. ``out`` is the store's name.

    Raises ``StoreBusyError`` while another process has it, ``StoreMismatchError`` when something else is there."""

    def __init__(self, out: Path, plan: Manifest) -> None:
        self.path = part_of(out)
        self.store, self.group, self.unit = self.path / "store", self.path / "store" / GROUP, self.path / "unit"
        _refuse_other(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = FolderLock(self.path)
        except StoreBusyError as error:
            raise StoreBusyError(
                f"another process packs into {str(out)!r} ({error}): wait until it is done, or give another folder"
            ) from None
        self.begun = os.path.lexists(self.path / PLAN)
        try:
            if self.begun:
                self._check_plan(plan)
            for folder in (self.store, self.group):
                if folder.is_symlink():
                    raise StoreMismatchError(f"{str(folder)!r} is a link: nothing was touched: delete the link")
                folder.mkdir(exist_ok=True)
            self.replace(self.path / PLAN, plan.document().encode())
            sync([self.group, self.store, self.path, self.path.parent])
            shutil.rmtree(self.unit, ignore_errors=True)
        except BaseException:
            self.leave()
            raise

    def whole_unit(self, number: int, unit: PackedUnit) -> PackedUnit | None:
        """Unit ``number``, if an earlier process left it whole; anything else in its place is deleted."""
        folder = self.group / unit_name(number)
        if not os.path.lexists(folder):
            return None
        with suppress(StoreError, OSError):
            raw, found, _ = read_unit(self.group, number, unit)
            if not folder.is_symlink() and os.lstat(folder / DATA).st_size == unit.nbytes:
                return replace(found, document_crc32c=text_crc32c(raw))
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink()
        else:
            shutil.rmtree(folder)
        return None

    def replace(self, path: Path, content: bytes) -> None:
        """Put a small file in the place of another; durable when its folder is."""
        new = self.path / _NEW
        new.unlink(missing_ok=True)
        with new.open("xb") as file:
            file.write(content)
        sync([new])
        os.replace(new, path)

    def leave(self) -> None:
        """Let others have the folder. It goes if it was made here and nothing in it is worth going on with."""
        if self.lock.held and not self.begun:
            with suppress(OSError):  # a whole unit is in it
                shutil.rmtree(self.unit, ignore_errors=True)
                for folder in (self.group, self.store):
                    if os.path.lexists(folder):
                        folder.rmdir()
                (self.path / _NEW).unlink(missing_ok=True)
                self._remove()
        self.lock.release()

    def become(self, out: Path) -> None:
        """Give the store its name, durably, and take the folder away."""
        os.rename(self.store, out)
        sync([out.parent])
        self._remove()

    def _remove(self) -> None:
        (self.path / PLAN).unlink(missing_ok=True)
        self.lock.release(delete=True)
        with suppress(OSError):  # someone's files are in it
            self.path.rmdir()

    def _check_plan(self, plan: Manifest) -> None:
        try:
            found = parse_manifest(read_file(self.path / PLAN), repr(str(self.path / PLAN)))
        except StoreError as error:
            raise StoreMismatchError(f"{error}: delete {str(self.path)!r} to begin anew") from error
        if why := difference(found, plan):
            raise StoreMismatchError(
                f"{str(self.path)!r} holds the beginning of another packing, {why}: give another folder to pack into, "
                f"or delete {str(self.path)!r} to begin anew"
            )


def take_away_done(out: Path) -> None:
    """Remove what a process that was killed right after the last rename left beside the whole store ``out``."""
    part = part_of(out)
    if part.is_dir() and not part.is_symlink() and set(os.listdir(part)) <= {PLAN, LOCK}:
        with suppress(OSError, StoreBusyError):  # it does no harm, and may be another process's
            lock = FolderLock(part)
            (part / PLAN).unlink(missing_ok=True)
            lock.release(delete=True)
            part.rmdir()


def bare(manifest: Manifest) -> Manifest:
    """What is known of a store before it is packed."""
    units = tuple(PackedUnit(tuple(replace(e, relative_error=None) for e in unit.tensors)) for unit in manifest.units)
    return replace(manifest, units=units, files={})


def difference(have: Manifest, want: Manifest) -> str:
    """What tells two plans apart, or nothing."""
    for key in sorted({*have.source, *want.source}):
        if have.source.get(key) != want.source.get(key):
            return f"of another source ({key} is {have.source.get(key)!r}, now {want.source.get(key)!r})"
    if have.default_format != want.default_format:
        return f"of default format {have.default_format!r}, now {want.default_format!r}"
    have, want = bare(have), bare(want)
    for name in (*want.tensors, *have.tensors):
        one, other = have.tensors.get(name), want.tensors.get(name)
        if one != other:
            formats = [None if entry is None else entry.format for entry in (one, other)]
            return f"with tensor {name!r} in format {formats[0]!r}, now {formats[1]!r}"
    return "" if have.units == want.units else "cut into other units"


def faults(what: str) -> AbstractContextManager[None]:
    """``store_errors`` of one who packs."""
    return store_errors(what, when_full="what is whole stays: free space there and pack again, which goes on")


def _refuse_other(part: Path) -> None:
    """``StoreMismatchError`` when ``part`` is not ours to write in."""
    try:
        folder = stat.S_ISDIR(os.lstat(part).st_mode)
        names = set(os.listdir(part)) if folder else set()
    except FileNotFoundError:
        return
    if not folder or (PLAN not in names and not names <= {LOCK, _NEW, "store"}):
        raise StoreMismatchError(
            f"{str(part)!r} holds no packing of ours, and that name is needed while packing: nothing was touched: move "
            "it away, or give another folder"
        )
