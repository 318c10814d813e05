"""A packed store, read where it lies, each window of it checked when it is first read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from tierstore.contracts import ReadRequest
from tierstore.errors import ChecksumError, StoreError, StoreFormatError, StoreIncompleteError, StoreReadError
from tierstore.extents import Extent
from tierstore.stores.json_files import strict_json
from tierstore.stores.manifest import PackedUnit, text_crc32c, unit_name
from tierstore.stores.packed_files import (
    DATA,
    DOCUMENT,
    GROUP,
    PLAN,
    WINDOW,
    find_group,
    part_of,
    read_file,
    read_manifest,
    read_unit,
)
from tierstore.stores.reader import Reader
from tierstore.stores.windows import Window, Windows, spans_of
from tierstore.stores.workers import ReadFence, Workers
from tierstore.tensors import Piece, TensorSpec

_AT_ONCE = 4 << 20
"""Bytes beyond those asked for that one read may bring to check windows."""


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a packed store, whole or not: something that ``PackedStore`` opens or has a word on."""
    path = Path(path)
    if os.path.lexists(path / PLAN) or (not os.path.lexists(path) and os.path.lexists(part_of(path) / PLAN)):
        return True
    if not os.path.lexists(path / GROUP / DOCUMENT):
        return os.path.lexists(path / GROUP)
    try:
        document = strict_json(read_file(path / GROUP / DOCUMENT), "")
    except StoreError:  # opening it says how it is damaged
        return True
    match document:
        case {"attributes": {"tierstore": {"layout_version": _}}}:
            return True
    return False


class PackedStore:
    """The stored tensors of the packed store in folder ``path``: ``w`` where ``w`` is kept, ``w.codes`` ... where not.

    ``manifest`` says what they are to the model. The first time that bytes of a window of 1 MiB are read, its CRC32C
    is checked before the fence is done: ``ChecksumError`` comes out of the fence then, and ``StoreReadError``.
    Nothing is written. Raises ``StoreIncompleteError`` for a store that was not packed or copied to the end,
    ``StoreFormatError`` and ``ChecksumError`` for one that is damaged, ``StoreError`` where there is none.
    """

    tier = "nvme"

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 4) -> None:
        self._folder = find_group(Path(path))
        self.manifest = read_manifest(self._folder)
        units = self.manifest.units
        crcs = [read_crcs(self._folder, number, unit) for number, unit in enumerate(units)]
        self.paths: tuple[Path, ...] = tuple(self._folder / unit_name(number) / DATA for number in range(len(units)))
        specs: dict[str, TensorSpec] = {}
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        for number, unit in enumerate(units):
            for spec, extent in unit.placed:
                specs[spec.name], self._pieces[spec.name] = spec, (Piece(number, extent),)
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(specs)
        for file in self.paths:
            if not os.path.lexists(file):
                raise StoreIncompleteError(f"{str(file)!r} is missing: copy the store again, or pack it again")
        self._reader = Reader(self.paths, threads=threads)
        try:
            for file, size, unit in zip(self.paths, self._reader.sizes, units, strict=True):
                check_size(file, size, unit)
            self._windows = Windows(self._reader.sizes, crcs, WINDOW)
            self._checker = Workers(1)
        except BaseException:
            self._reader.close()
            raise

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The one extent of stored tensor ``name``, which starts at a multiple of 4096. Raises ``KeyError``."""
        return self._pieces[name]

    def read(self, requests: Sequence[ReadRequest]) -> ReadFence:
        """Start reading. Windows that were not read before are read whole and checked before the fence is done."""
        windows = self._windows.unchecked(requests)
        if not windows:
            return self._reader.read(requests)
        nbytes = sum(request.extent.nbytes for request in requests)
        gaps = list(self._windows.gaps(windows, spans_of(requests)))
        if sum(extent.nbytes for _, extent in gaps) <= _AT_ONCE:
            requests = [*requests, *_into_fresh(gaps)]
        read = self._reader.read(requests)
        checked = ReadFence(nbytes, requests)
        self._checker.submit(checked, [_Check(checked, read, self, windows, requests)])
        return checked

    def check(self, windows: Sequence[Window], requests: Sequence[ReadRequest]) -> None:
        """Raise ``ChecksumError`` if one of ``windows`` is wrong. ``requests`` have been read; what else the windows
        hold is read now, a few MiB at a time."""
        step = _AT_ONCE // WINDOW
        for some in (windows[at : at + step] for at in range(0, len(windows), step)):
            spans = spans_of(requests)
            if gaps := list(self._windows.gaps(some, spans)):
                more = _into_fresh(gaps)
                self._reader.read(more).wait()
                spans = spans_of([*requests, *more])
            for window in some:
                if (wrong := self._windows.check(window, spans)) is not None:
                    file, number = window
                    raise ChecksumError(wrong_window(self.manifest.units[file], self.paths[file], number, *wrong))

    def close(self) -> None:
        """End the threads and close the files. Idempotent."""
        self._reader.close()
        self._checker.close()


def wrong_window(unit: PackedUnit, file: Path, number: int, crc: int, wanted: int) -> str:
    """What to say of a window whose CRC32C is not the one it was written with."""
    extent = Extent(number * WINDOW, min(WINDOW, unit.nbytes - number * WINDOW))
    names = [spec.name for spec, place in unit.placed if place.overlaps(extent)]
    what = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"{what or 'padding'} in {str(file)!r}: the {extent.nbytes} bytes at byte {extent.offset} have CRC32C "
        f"{crc:08x}, they were written with {wanted:08x}: the disk, a copy or another program changed them: copy the "
        "store again, or pack it again"
    )


def check_size(file: Path, nbytes: int, unit: PackedUnit) -> None:
    """Raise ``StoreIncompleteError`` or ``StoreFormatError`` unless a unit file has the bytes it was written with."""
    if nbytes < unit.nbytes:
        raise StoreIncompleteError(
            f"{str(file)!r} has {nbytes} bytes, {unit.nbytes} were written: it was cut short: copy the store again, or "
            "pack it again"
        )
    if nbytes > unit.nbytes:
        raise StoreFormatError(
            f"{str(file)!r} has {nbytes} bytes, {unit.nbytes} were written: it is not what was packed: copy the store "
            "again, or pack it again"
        )


def read_crcs(group: Path, number: int, unit: PackedUnit) -> tuple[int, ...]:
    """The CRC32C of each window of unit ``number``, from its validated document."""
    raw, found, crcs = read_unit(group, number, unit)
    if (crc := text_crc32c(raw)) != unit.document_crc32c or found != unit:
        raise ChecksumError(
            f"{str(group / unit_name(number) / DOCUMENT)!r} has CRC32C {crc:08x}, the manifest has "
            f"{unit.document_crc32c:08x}: the unit is of another packing, or was changed: copy the store again, or "
            "pack it again"
        )
    return crcs


@dataclass(slots=True)
class _Check:
    """Runs behind a read, on its own thread, and hands its outcome to ``fence``."""

    fence: ReadFence
    read: ReadFence
    store: PackedStore
    windows: Sequence[Window]
    requests: Sequence[ReadRequest]

    def run(self, scratch: memoryview, address: int) -> None:
        self.read.wait()
        self.fence.started = self.read.started
        try:
            self.store.check(self.windows, self.requests)
        except (StoreReadError, ChecksumError):
            raise
        except StoreError as error:
            raise StoreReadError(f"a read could not be checked: {error}") from error


def _into_fresh(gaps: Sequence[tuple[int, Extent]]) -> list[ReadRequest]:
    """Requests that bring ``gaps`` into memory of their own."""
    room = torch.empty(sum(extent.nbytes for _, extent in gaps), dtype=torch.uint8)
    found, at = [], 0
    for file, extent in gaps:
        found.append(ReadRequest(file, extent, room[at : at + extent.nbytes]))
        at += extent.nbytes
    return found
