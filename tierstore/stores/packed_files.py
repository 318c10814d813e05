"""What lies where in a packed store's folder, and the documents of its unit files.

OUT/config.json ...                     plain files
OUT/weights.zarr/zarr.json              the manifest, of the Zarr v3 group
OUT/weights.zarr/unit-00000/zarr.json   of an uncompressed uint8 array of one chunk
OUT/weights.zarr/unit-00000/c/0         the tensors of the unit, raw
OUT.part/                               all that while it is being packed (see packed_writer.py)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tierstore.errors import StoreError, StoreFormatError, StoreIncompleteError
from tierstore.stores.checked_json import AGAIN, short
from tierstore.stores.json_files import read_bytes, strict_json
from tierstore.stores.manifest import ALIGN, MAX_DOCUMENT_NBYTES, Manifest, PackedUnit, parse_manifest, unit_name
from tierstore.stores.reader import open_regular
from tierstore.stores.zarr_documents import array_document

GROUP = "weights.zarr"
DOCUMENT = "zarr.json"
DATA = Path("c") / "0"
PLAN = "packing.json"
"""What is being packed, in the folder where it is."""
WINDOW = 1 << 20
"""Bytes of a unit file that one checksum is of."""


def part_of(out: Path) -> Path:
    """The folder in which ``out`` is packed before it gets its name."""
    return out.with_name(out.name + ".part")


def windows_of(unit: PackedUnit) -> int:
    """How many checksums a unit file has."""
    return -(-unit.nbytes // WINDOW)


def unit_document(unit: PackedUnit, crcs: Sequence[int]) -> str:
    """The ``zarr.json`` of a unit; ``crcs`` are those of its windows."""
    mine = {
        "parts": [
            {
                "name": part.name,
                "offset": extent.offset,
                "nbytes": extent.nbytes,
                "dtype": part.dtype,
                "shape": list(part.shape),
            }
            for part, extent in unit.placed
        ],
        "relative_errors": {e.name: e.relative_error for e in unit.tensors if e.relative_error is not None},
        "window_nbytes": WINDOW,
        "crc32c": [f"{crc:08x}" for crc in crcs],
    }
    return array_document(unit.nbytes, mine)


def parse_unit(raw: bytes, unit: PackedUnit, where: str) -> tuple[PackedUnit, tuple[int, ...]]:
    """Validate the document ``raw`` of ``unit``: the unit with the errors it gives, and the CRC32C of each window.

    ``where`` names the file. Raises ``StoreFormatError``."""
    document = strict_json(raw, where)
    match document:
        case {
            "attributes": {"tierstore": {"parts": list(parts), "relative_errors": dict(errors), "crc32c": list(crcs)}}
        }:
            pass
        case _:
            raise StoreFormatError(f"{where} is not the document of a packed store's unit: {AGAIN}")
    _check_parts(parts, unit, where)
    if len(crcs) != windows_of(unit):
        raise StoreFormatError(f"{where} has {len(crcs)} checksums, {windows_of(unit)} are needed: {AGAIN}")
    for crc in crcs:
        if not isinstance(crc, str) or not re.fullmatch("[0-9a-f]{8}", crc):
            raise StoreFormatError(f"{where} has the checksum {short(crc)}, 8 hexadecimal digits are needed: {AGAIN}")
    for name, error in errors.items():
        if type(error) is not float or not 0 <= error < 1e300:
            raise StoreFormatError(
                f"{where} has the relative error {short(error)} for {short(name)}, a number from 0 is needed: {AGAIN}"
            )
    found = replace(unit, tensors=tuple(replace(e, relative_error=errors.get(e.name)) for e in unit.tensors))
    numbers = tuple(int(crc, 16) for crc in crcs)
    # Written again it must be the same: then every other word in it is right too.
    if json.loads(unit_document(found, numbers)) != document:
        raise StoreFormatError(f"{where} says something else of the array than the manifest: {AGAIN}")
    return found, numbers


def _check_parts(parts: Sequence[object], unit: PackedUnit, where: str) -> None:
    end, whole = 0, unit.nbytes
    for number, (spec, extent) in enumerate(unit.placed):
        match parts[number] if number < len(parts) else None:
            case {"name": str(name), "offset": int(offset), "nbytes": int(nbytes), "dtype": dtype, "shape": shape}:
                pass
            case _:
                raise StoreFormatError(f"{where} has no whole description of part {spec.name!r}: {AGAIN}")
        what = f"part {short(name)} of {where}"
        if (name, dtype, shape) != (spec.name, spec.dtype, list(spec.shape)):
            raise StoreFormatError(
                f"{what} is {short(dtype)} of shape {short(shape)} where the manifest has {spec.name!r}, "
                f"{spec.dtype} of shape {list(spec.shape)}: the unit is of another model or packing: {AGAIN}"
            )
        if offset % ALIGN or offset < 0:
            raise StoreFormatError(f"{what} starts at byte {offset}, a multiple of {ALIGN} is needed: {AGAIN}")
        if offset < end:
            raise StoreFormatError(f"{what} starts at byte {offset} and overlaps the one before: {AGAIN}")
        if offset + nbytes > whole:
            raise StoreFormatError(f"{what} ends at byte {short(offset + nbytes)}, the unit has {whole}: {AGAIN}")
        if (offset, nbytes) != (extent.offset, extent.nbytes):
            raise StoreFormatError(
                f"{what} has {nbytes} bytes at {offset}, {extent.nbytes} at {extent.offset} are needed: {AGAIN}"
            )
        end = offset + nbytes
    if len(parts) > len(unit.placed):
        raise StoreFormatError(f"{where} has {len(parts)} parts, the manifest has {len(unit.placed)}: {AGAIN}")


def find_group(path: Path) -> Path:
    """The Zarr group of the packed store in folder ``path``.

    Raises ``StoreIncompleteError`` for one that is half packed, ``StoreError`` where there is none."""
    if os.path.lexists(path / PLAN):
        raise StoreIncompleteError(
            f"{str(path)!r} is half packed: pack again into {str(path).removesuffix('.part')!r}, which goes on where "
            "it stopped, or delete it"
        )
    group = path / GROUP
    if os.path.lexists(group / DOCUMENT):
        return group
    if os.path.lexists(group):
        raise StoreIncompleteError(
            f"{str(group)!r} has no {DOCUMENT}: it was not packed or copied to the end: pack or copy it again"
        )
    if not os.path.lexists(path) and os.path.lexists(part_of(path) / PLAN):
        raise StoreIncompleteError(
            f"{str(path)!r} is half packed, in {str(part_of(path))!r}: pack it again, which goes on where it stopped"
        )
    raise StoreError(f"{str(path)!r} holds no {GROUP}: give the folder of a packed store")


def read_manifest(group: Path) -> Manifest:
    """The validated manifest of a group."""
    return parse_manifest(read_file(group / DOCUMENT), repr(str(group / DOCUMENT)))


def read_unit(group: Path, number: int, unit: PackedUnit) -> tuple[bytes, PackedUnit, tuple[int, ...]]:
    """The document of unit ``number``, and what ``parse_unit`` has from it."""
    path = group / unit_name(number) / DOCUMENT
    raw = read_file(path)
    return (raw, *parse_unit(raw, unit, repr(str(path))))


def read_file(path: Path, most: int = MAX_DOCUMENT_NBYTES) -> bytes:
    """A small file. Raises ``StoreIncompleteError`` when it is missing, ``StoreError`` when it cannot be read."""
    if not os.path.lexists(path):
        raise StoreIncompleteError(f"{str(path)!r} is missing: {AGAIN}")
    fd = open_regular(path)
    try:
        raw = read_bytes(fd, most + 1, path)
    finally:
        os.close(fd)
    if len(raw) > most:
        raise StoreFormatError(f"{str(path)!r} is longer than {most} bytes: {AGAIN}")
    return raw
