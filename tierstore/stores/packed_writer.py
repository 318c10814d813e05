"""Packs a store unit by unit, so that it is there whole or not at all, and goes on after a kill."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tierstore.budget import format_nbytes
from tierstore.errors import StoreError, StoreFullError, StoreMismatchError
from tierstore.stores.checked_json import check_file_name
from tierstore.stores.durable import sync, write_text
from tierstore.stores.manifest import (
    Manifest,
    PackedEntry,
    PackedUnit,
    PlainFile,
    parse_manifest,
    text_crc32c,
    unit_name,
)
from tierstore.stores.packed_files import DATA, DOCUMENT, GROUP, WINDOW, read_manifest, unit_document
from tierstore.stores.streamed import StreamedFile
from tierstore.stores.unfinished import Unfinished, bare, difference, faults, take_away_done
from tierstore.stores.workers import PAGE
from tierstore.tensors import KEEP, TensorSpec


def find_packed(out: str | os.PathLike[str], plan: Manifest) -> Manifest | None:
    """The manifest of ``out`` if it is packed already as ``plan`` says; None where nothing is, or an empty folder.

    Raises ``StoreMismatchError`` when something else is there, and what reading a manifest raises."""
    out = Path(os.path.realpath(out))
    with faults(f"cannot look into {str(out)!r}"):
        if not os.path.lexists(out):
            return None
        movable = out.is_dir() and not os.path.ismount(out)
        if movable and not os.listdir(out):
            return None
        if not os.path.lexists(out / GROUP / DOCUMENT):
            what = "holds other things" if movable else "cannot be made by a rename, as a mount point or a file cannot"
            raise StoreMismatchError(f"{str(out)!r} {what}: nothing was touched: give a folder that does not exist yet")
        found = read_manifest(out / GROUP)
        if why := difference(found, plan):
            raise StoreMismatchError(
                f"{str(out)!r} is another packed store, {why}: nothing was touched: give another folder, or delete it"
            )
        take_away_done(out)
    return found


class PackedWriter:
    """The right of one process to pack one store; used by one thread at a time.

    ``out`` must not exist or be an empty folder; until the store is whole it is made in ``OUT.part`` beside it. A
    packing that another process left there is gone on with. ``plan`` gives source, default format, and every unit
    with its entries; errors, checksums and files in it are not looked at.

    Raises ``StoreFormatError`` for a plan that no store can have, ``StoreMismatchError`` when ``out`` or ``OUT.part``
    hold something else, ``StoreBusyError`` while another process packs there, ``StoreFullError`` when the disk has no
    room for what is left, ``StoreError`` when ``out`` is packed already. Every method raises ``StoreFullError`` when
    the disk gets full and ``StoreError`` for other faults of it: whatever is raised, whole units stay.
    """

    def __init__(self, out: str | os.PathLike[str], plan: Manifest) -> None:
        self._out = Path(os.path.realpath(out))
        self._plan = bare(plan)
        self._files: dict[str, PlainFile] = {}
        parse_manifest(self._plan.document().encode(), f"the plan for {str(self._out)!r}")
        with faults(f"cannot pack into {str(self._out)!r}"):
            self._refuse_packed()
            self._place = Unfinished(self._out, self._plan)
            try:
                self._refuse_packed()  # the process that had the folder may just have ended
                found = [(n, self._place.whole_unit(n, unit)) for n, unit in enumerate(self._plan.units)]
                self._units = {number: unit for number, unit in found if unit is not None}
                self._check_room()
            except BaseException:
                self._place.leave()
                raise

    @property
    def left(self) -> tuple[int, ...]:
        """Numbers of the units that are not whole yet, to be written in any order."""
        return tuple(number for number in range(len(self._plan.units)) if number not in self._units)

    @contextmanager
    def unit(self, number: int) -> Iterator[UnitWriter]:
        """Write unit ``number``: whole when the block ends without error, else as if it had not begun."""
        if number not in self.left:
            raise StoreError(f"unit {number} is not among those left, {list(self.left)}: write each of those once")
        folder, what = self._place.unit, f"{unit_name(number)} of {str(self._out)!r}"
        with self._writing(what):
            folder.mkdir()
        try:
            with self._writing(what):
                (folder / DATA).parent.mkdir()
                writer = UnitWriter(folder / DATA, self._plan.units[number], what)
            try:
                yield writer
                unit, crcs = writer.finish()
            finally:
                writer.close()
            document = unit_document(unit, crcs)
            with self._writing(what):
                write_text(folder / DOCUMENT, document)
                sync([folder / DATA, (folder / DATA).parent, folder / DOCUMENT, folder])
                os.rename(folder, self._place.group / unit_name(number))
                sync([self._place.group])
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._units[number] = replace(unit, document_crc32c=text_crc32c(document.encode()))

    def add_file(self, name: str, content: bytes) -> None:
        """Put a file beside the weights, such as ``config.json``; ``name`` may have folders. Replaces an earlier one.

        A process that goes on does it again. Raises ``StoreFormatError`` for a name that leaves the folder."""
        check_file_name(name, f"{str(self._out)!r} cannot have")
        path = self._place.store / name
        with self._writing(f"{name!r} of {str(self._out)!r}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._place.replace(path, content)
            sync(parent for parent in path.parents if parent.is_relative_to(self._place.store))
        self._files[name] = PlainFile(len(content), text_crc32c(content))

    def finish(self) -> Manifest:
        """Give the store its name, durably, and close. Raises ``StoreError`` while units are left."""
        if self.left:
            raise StoreError(
                f"{len(self.left)} units of {str(self._out)!r} are left, unit {self.left[0]} first: write it"
            )
        units = tuple(self._units[number] for number in range(len(self._plan.units)))
        manifest = replace(self._plan, units=units, files=dict(self._files))
        with self._writing(f"the manifest of {str(self._out)!r}"):
            self._place.replace(self._place.group / DOCUMENT, manifest.document().encode())
            sync([self._place.group, self._place.store])
            self._place.become(self._out)
        return manifest

    def close(self) -> None:
        """Let others go on with what is whole. Idempotent."""
        self._place.leave()

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        if not self._place.lock.held:
            raise StoreError(f"the writer of {what} is closed: make a new one, which goes on where this one stopped")
        with faults(f"cannot write {what}"):
            yield

    def _refuse_packed(self) -> None:
        if find_packed(self._out, self._plan) is not None:
            raise StoreError(f"{str(self._out)!r} is packed already, of the same source in the same formats: use it")

    def _check_room(self) -> None:
        # Beside its bytes a unit takes two folders of a block each, and a document: 12 bytes a window, 300 a part.
        left = [self._plan.units[number] for number in self.left]
        need = sum(unit.nbytes + 4 * PAGE + unit.nbytes // WINDOW * 12 + len(unit.placed) * 300 for unit in left)
        free = shutil.disk_usage(self._place.path).free
        if need > free:
            raise StoreFullError(
                f"{len(left)} units of {str(self._out)!r} need {format_nbytes(need)} on disk, {format_nbytes(free)} "
                "are free: free space there and pack again, or give a folder on another disk"
            )


class UnitWriter:
    """Takes the tensors of one unit in the order of the plan."""

    def __init__(self, path: Path, unit: PackedUnit, what: str) -> None:
        self._unit, self._what = unit, what
        self._done: list[PackedEntry] = []
        self._file = StreamedFile(path, window_nbytes=WINDOW)

    def add(self, name: str, data: Tensor | Mapping[str, Tensor], *, relative_error: float | None = None) -> None:
        """Write tensor ``name``, from any device: itself where it is kept, else its parts by the format's names.

        The tensors may be changed again when this returns. Raises ``StoreError`` for another tensor than is next, and
        for parts of other names, dtypes or shapes than planned."""
        entry = self._next()
        if relative_error is not None and not 0 <= relative_error < 1e300:
            raise StoreError(f"the relative error of {name!r} is {relative_error}, a number from 0 is needed")
        if entry is None or entry.name != name:
            raise StoreError(f"{name!r} is given for {self._what}, {entry and entry.name!r} is next: keep to the plan")
        given = {name: data} if isinstance(data, Tensor) else {f"{name}.{part}": data[part] for part in data}
        names = [spec.name for spec in entry.stored]
        if isinstance(data, Tensor) != (entry.format == KEEP) or given.keys() != set(names):
            raise StoreError(f"{name!r} in format {entry.format!r} is stored as {names}, got {list(given)}")
        for spec in entry.stored:
            _check_tensor(spec, given[spec.name])
        with faults(f"cannot write {self._what}"):
            for spec in entry.stored:
                plain = given[spec.name].detach().cpu().resolve_conj().resolve_neg().contiguous()
                self._file.write(plain.reshape(-1).view(torch.uint8))
                self._file.pad()
        self._done.append(replace(entry, relative_error=None if relative_error is None else float(relative_error)))

    def finish(self) -> tuple[PackedUnit, tuple[int, ...]]:
        """The unit with its errors, and the checksum of each window. Raises ``StoreError`` if tensors are missing."""
        if (entry := self._next()) is not None:
            raise StoreError(f"{entry.name!r} of {self._what} was not given: add every tensor of the unit")
        with faults(f"cannot write {self._what}"):
            self._file.finish()
        return replace(self._unit, tensors=tuple(self._done)), tuple(self._file.crcs)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def _next(self) -> PackedEntry | None:
        entries = self._unit.tensors
        return entries[len(self._done)] if len(self._done) < len(entries) else None


def _check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    have = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if have != (spec.dtype, spec.shape) or tensor.is_meta or tensor.layout is not torch.strided:
        raise StoreError(
            f"{spec.name!r} is {have[0]} of shape {have[1]} on {tensor.device}, {tensor.layout}; planned is dense "
            f"{spec.dtype} of shape {spec.shape}: give what the plan says"
        )
