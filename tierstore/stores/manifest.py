"""What a packed store's group document says: which tensors, in which formats and unit files, and packed from what.

Everything is validated before one number of it is used; every way to be wrong has its own message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import cast

import google_crc32c

from tierstore.errors import ChecksumError, StoreFormatError, TierstoreError
from tierstore.extents import Extent, align_up
from tierstore.stores.checked_json import (
    AGAIN,
    SPEC_KEYS,
    check_file_name,
    need_crc,
    need_list,
    need_object,
    need_spec,
    need_text,
    need_texts,
    need_whole,
    short,
)
from tierstore.stores.json_files import kind_of, strict_json
from tierstore.stores.zarr_documents import group_document
from tierstore.tensors import KEEP, TensorSpec

LAYOUT_VERSION = 2
"""Rises with every change of what stored bytes mean, those of a format's parts too."""
ALIGN = 4096
"""Bytes: where a stored tensor may begin in its unit file."""
MAX_DOCUMENT_NBYTES = 100_000_000
_KEYS = frozenset(["layout_version", "written_by", "source", "default_format", "nbytes", "units", "files", "crc32c"])
_UNIT_KEYS = frozenset(["name", "nbytes", "zarr_json_crc32c", "tensors"])
_TENSOR_KEYS = SPEC_KEYS | {"format", "relative_error", "parts"}
_FILE_KEYS = frozenset(("nbytes", "crc32c"))
_PART = re.compile(r"[a-z][a-z0-9_]{0,31}")
_FORMAT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class PackedEntry:
    """A tensor of the model: its own ``dtype`` and ``shape``, and what is stored for it.

    ``parts`` are those that the format has for the shape, named as the format names them; a kept tensor has none.
    ``relative_error`` is the root mean square of the error, divided by that of the values.
    """

    name: str
    format: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[TensorSpec, ...]
    relative_error: float | None = None

    @cached_property
    def stored(self) -> tuple[TensorSpec, ...]:
        """What is stored, by stored name: the tensor itself, or its parts as ``"<name>.<part>"``."""
        if self.format == KEEP:
            return (TensorSpec(self.name, self.dtype, self.shape),)
        return tuple(TensorSpec(f"{self.name}.{part.name}", part.dtype, part.shape) for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes stored, without padding."""
        return sum(part.nbytes for part in self.stored)

    @property
    def source_nbytes(self) -> int:
        """Bytes before packing."""
        return TensorSpec(self.name, self.dtype, self.shape).nbytes


@dataclass(frozen=True)
class PackedUnit:
    """What lies in one unit file. ``document_crc32c`` is that of the unit's own ``zarr.json``."""

    tensors: tuple[PackedEntry, ...]
    document_crc32c: int = 0

    @cached_property
    def placed(self) -> tuple[tuple[TensorSpec, Extent], ...]:
        """Each stored tensor and its bytes in the file: in order, each at the next multiple of 4096."""
        found, at = [], 0
        for part in (part for entry in self.tensors for part in entry.stored):
            found.append((part, Extent(at, part.nbytes)))
            at = align_up(at + part.nbytes, ALIGN)
        return tuple(found)

    @property
    def nbytes(self) -> int:
        """Bytes of the file, a multiple of 4096."""
        return align_up(self.placed[-1][1].end, ALIGN) if self.placed else 0


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A file beside the weights, such as ``config.json``."""

    nbytes: int
    crc32c: int


@dataclass(frozen=True)
class Manifest:
    """A packed store. ``source`` says what it was packed from, in words of who packed it; ``written_by`` informs."""

    source: Mapping[str, str]
    default_format: str
    units: tuple[PackedUnit, ...]
    files: Mapping[str, PlainFile] = field(default_factory=dict)
    written_by: str = ""
    layout_version: int = LAYOUT_VERSION

    @cached_property
    def tensors(self) -> Mapping[str, PackedEntry]:
        """Every tensor of the model by name, in the order stored."""
        return MappingProxyType({entry.name: entry for unit in self.units for entry in unit.tensors})

    @property
    def nbytes(self) -> int:
        """Bytes of all unit files."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def source_nbytes(self) -> int:
        """Bytes of all tensors before packing."""
        return sum(entry.source_nbytes for entry in self.tensors.values())

    def document(self) -> str:
        """The group's ``zarr.json``."""
        mine: dict[str, object] = {
            "layout_version": self.layout_version,
            "written_by": self.written_by,
            "source": dict(self.source),
            "default_format": self.default_format,
            "nbytes": self.nbytes,
            "units": [_unit_json(number, unit) for number, unit in enumerate(self.units)],
            "files": {name: {"nbytes": f.nbytes, "crc32c": f"{f.crc32c:08x}"} for name, f in self.files.items()},
        }
        mine["crc32c"] = f"{_crc_of(mine):08x}"
        return group_document(mine)


def unit_name(number: int) -> str:
    """The Zarr array of unit ``number``."""
    return f"unit-{number:05d}"


def text_crc32c(text: bytes) -> int:
    """CRC32C of a document or another small file."""
    return int(google_crc32c.value(text))


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Validate the group document ``raw``. ``where`` names the file in errors.

    Raises ``StoreFormatError`` for anything malformed, ``ChecksumError`` where only the checksum tells."""
    if len(raw) > MAX_DOCUMENT_NBYTES:
        raise StoreFormatError(f"{where} is longer than {MAX_DOCUMENT_NBYTES} bytes, which no manifest is: {AGAIN}")
    match strict_json(raw, where):
        case {"node_type": "group", "zarr_format": 3, "attributes": {"tierstore": dict(mine), **other}, **rest} if (
            not other and rest.keys() == set()
        ):
            pass
        case _:
            raise StoreFormatError(f"{where} is not the group document of a packed store: give the folder of one")
    version = mine.get("layout_version")
    if type(version) is not int or version < 1:
        raise StoreFormatError(f"{where} has layout_version {short(version)}, an int from 1 is needed: {AGAIN}")
    if version != LAYOUT_VERSION:
        upgrade = "upgrade tierstore, or " if version > LAYOUT_VERSION else ""
        raise StoreFormatError(
            f"{where} has layout_version {short(version)}, this tierstore reads {LAYOUT_VERSION}: "
            f"{upgrade}pack the model again with this one"
        )
    table = need_object(mine, _KEYS, f"the manifest in {where}")
    units = tuple(
        _unit(value, number, where) for number, value in enumerate(need_list(table["units"], f"the units of {where}"))
    )
    manifest = Manifest(
        source=need_texts(table["source"], f"the source of {where}"),
        default_format=_format(table["default_format"], f"the default_format of {where}"),
        units=units,
        files=_files(table["files"], where),
        written_by=need_text(table["written_by"], f"written_by of {where}"),
    )
    _check_names(manifest, where)
    if (nbytes := need_whole(table["nbytes"], f"nbytes of {where}")) != manifest.nbytes:
        raise StoreFormatError(f"{where} says {nbytes} bytes in all, its units have {manifest.nbytes}: {AGAIN}")
    wanted = need_crc(table.pop("crc32c"), f"crc32c of {where}")
    if (crc := _crc_of(table)) != wanted:
        raise ChecksumError(
            f"the manifest in {where} has CRC32C {crc:08x}, it was written with {wanted:08x}: it was changed: {AGAIN}"
        )
    return manifest


def check_parts(
    manifest: Manifest, parts_of: Callable[[str, tuple[int, ...]], Iterable[TensorSpec]], where: str
) -> None:
    """Compare every packed tensor's parts with what its format has for its shape.

    ``parts_of(format, shape)`` gives them, and raises an error of tierstore for a format it
    does not know. Raises ``StoreFormatError``."""
    for entry in manifest.tensors.values():
        if entry.format == KEEP:
            continue
        try:
            wanted = tuple(parts_of(entry.format, entry.shape))
        except TierstoreError as error:
            raise StoreFormatError(f"tensor {entry.name!r} of {where}: {error}: or upgrade tierstore") from error
        if wanted != entry.parts:
            raise StoreFormatError(
                f"tensor {entry.name!r} of {where} is in format {entry.format!r} and has the parts "
                f"{_said(entry.parts)}; {_said(wanted)} are needed for shape {entry.shape}: {AGAIN}"
            )


def _unit_json(number: int, unit: PackedUnit) -> dict[str, object]:
    return {
        "name": unit_name(number),
        "nbytes": unit.nbytes,
        "zarr_json_crc32c": f"{unit.document_crc32c:08x}",
        "tensors": [
            {
                "name": entry.name,
                "format": entry.format,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "relative_error": entry.relative_error,
                "parts": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in entry.parts],
            }
            for entry in unit.tensors
        ],
    }


def _crc_of(mine: Mapping[str, object]) -> int:
    return text_crc32c(json.dumps(mine, sort_keys=True, separators=(",", ":")).encode())


def _unit(value: object, number: int, where: str) -> PackedUnit:
    what = f"unit {number} of {where}"
    table = need_object(value, _UNIT_KEYS, what)
    if table["name"] != unit_name(number):
        raise StoreFormatError(f"{what} is named {short(table['name'])}, {unit_name(number)!r} is needed: {AGAIN}")
    entries = tuple(_entry(each, what) for each in need_list(table["tensors"], f"the tensors of {what}"))
    if not entries:
        raise StoreFormatError(f"{what} holds no tensor, at least one is needed: {AGAIN}")
    unit = PackedUnit(entries, need_crc(table["zarr_json_crc32c"], f"zarr_json_crc32c of {what}"))
    if (nbytes := need_whole(table["nbytes"], f"nbytes of {what}")) != unit.nbytes:
        raise StoreFormatError(f"{what} says it has {nbytes} bytes, its tensors take {unit.nbytes}: {AGAIN}")
    return unit


def _entry(value: object, where: str) -> PackedEntry:
    table = need_object(value, _TENSOR_KEYS, f"a tensor in {where}")
    spec = need_spec({key: table[key] for key in SPEC_KEYS}, f"a tensor in {where}")
    what = f"tensor {short(spec.name)} in {where}"
    form = _format(table["format"], f"the format of {what}")
    parts = tuple(need_spec(part, f"a part of {what}") for part in need_list(table["parts"], f"the parts of {what}"))
    if not (len(parts) == 0 if form == KEEP else 1 <= len(parts) <= 16):
        need = "none" if form == KEEP else "1 to 16"
        raise StoreFormatError(f"{what} is in format {form!r} and has {len(parts)} parts, {need} needed: {AGAIN}")
    for part in parts:
        if not _PART.fullmatch(part.name):
            raise StoreFormatError(f"{what} has a part named {short(part.name)}, a word is needed: {AGAIN}")
    error = table["relative_error"]
    if error is not None and not (type(error) in (int, float) and 0 <= cast(float, error) < 1e300):
        raise StoreFormatError(f"{what} has relative_error {short(error)}, a number from 0 or null is needed: {AGAIN}")
    return PackedEntry(
        spec.name, form, spec.dtype, spec.shape, parts, None if error is None else float(cast(float, error))
    )


def _check_names(manifest: Manifest, where: str) -> None:
    for kind, names in (
        ("tensor", [entry.name for unit in manifest.units for entry in unit.tensors]),
        ("stored tensor", [p.name for unit in manifest.units for entry in unit.tensors for p in entry.stored]),
    ):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise StoreFormatError(f"{where} has the {kind} {short(name)} twice, once is needed: {AGAIN}")
            seen.add(name)
    if manifest.nbytes >= 1 << 62:
        raise StoreFormatError(f"{where} has units of {short(manifest.nbytes)} bytes, which overflows: {AGAIN}")


def _files(value: object, where: str) -> dict[str, PlainFile]:
    if not isinstance(value, dict):
        raise StoreFormatError(f"the files of {where} are a JSON {kind_of(value)}, an object is needed: {AGAIN}")
    found = {}
    for name, each in value.items():
        check_file_name(name, f"{where} names")
        table = need_object(each, _FILE_KEYS, f"file {name!r} of {where}")
        nbytes = need_whole(table["nbytes"], f"nbytes of file {name!r} of {where}")
        found[name] = PlainFile(nbytes, need_crc(table["crc32c"], f"crc32c of file {name!r} of {where}"))
    return found


def _format(value: object, what: str) -> str:
    if not isinstance(value, str) or not _FORMAT.fullmatch(value):
        raise StoreFormatError(f"{what} is {short(value)}, a format's name such as 'int4' is needed: {AGAIN}")
    return value


def _said(parts: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{part.name} {part.dtype} {list(part.shape)}" for part in parts)[:300]
