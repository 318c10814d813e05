"""Safetensors checkpoints read where they lie: a file, a folder of shards, or an index.

A header is validated wholly before one of its numbers is used: every way to be wrong has its own message.
The layout is the one of https://huggingface.co/docs/safetensors (8 bytes of header length, JSON, data).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

from tierstore.contracts import ReadRequest
from tierstore.errors import StoreError, StoreFormatError
from tierstore.extents import Extent
from tierstore.stores.json_files import kind_of, read_bytes, strict_json
from tierstore.stores.reader import Reader, open_regular
from tierstore.stores.workers import ReadFence, reason_of
from tierstore.tensors import Piece, TensorSpec

MAX_HEADER_NBYTES = 100_000_000
"""Longest header or index, in bytes; the reference implementation stops at the same length."""
MAX_RANK = 64
"""Most dimensions of a tensor; torch has no more."""
DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "U16": "uint16",
        "I16": "int16",
        "F16": "float16",
        "BF16": "bfloat16",
        "U32": "uint32",
        "I32": "int32",
        "F32": "float32",
        "U64": "uint64",
        "I64": "int64",
        "F64": "float64",
        "C64": "complex64",
    }
)
"""torch's name of each dtype that a header may name."""
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Header:
    """What a valid header says: ``extents`` are absolute in the file, tensors are in the order of the file."""

    metadata: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    extents: Mapping[str, Extent]
    file_nbytes: int


class SafetensorsStore:
    """The tensors of a ``.safetensors`` file, of a folder that holds one or an index with shards, or of an index.

    Nothing is copied, converted or written. Raises ``StoreFormatError`` for a malformed or hostile file and
    ``StoreError`` for one that is missing, no regular file, or a pickle, which is never loaded.
    """

    tier = "nvme"

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 4) -> None:
        where = _locate(Path(path))
        index = _read_index(where) if where.name.endswith(".json") else None
        folder = where.parent
        self.paths: tuple[Path, ...] = (
            (where,) if index is None else tuple(folder / shard for shard in sorted(set(index.values())))
        )
        headers = [read_header(path) for path in self.paths]
        specs: dict[str, TensorSpec] = {}
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        metadata: dict[str, str] = {}
        for number, (file, header) in enumerate(zip(self.paths, headers, strict=True)):
            metadata = {**header.metadata, **metadata}
            for name, spec in header.specs.items():
                if name in self._pieces:
                    other = self.paths[self._pieces[name][0].file].name
                    raise StoreFormatError(
                        f"tensor {name!r} is in two shards of {str(folder)!r}, {other!r} and {file.name!r}, "
                        "one is needed: fetch them again"
                    )
                self._pieces[name] = (Piece(number, header.extents[name]),)
                specs[name] = spec
        if index is not None:
            self._check_index(where, index)
            specs = {name: spec for name, spec in specs.items() if name in index}
            self._pieces = {name: self._pieces[name] for name in specs}
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(specs)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self._reader = Reader(self.paths, threads=threads)
        for file, header, size in zip(self.paths, headers, self._reader.sizes, strict=True):
            if size != header.file_nbytes:
                self.close()
                raise StoreFormatError(
                    f"{str(file)!r} had {header.file_nbytes} bytes when its header was read and has {size} now: "
                    "wait until it is written, then open it again"
                )

    def _check_index(self, where: Path, index: Mapping[str, str]) -> None:
        for name, shard in index.items():
            found = self._pieces.get(name)
            have = None if found is None else self.paths[found[0].file].name
            if have != shard:
                truth = "no shard has it" if have is None else f"it is in {have!r}"
                raise StoreFormatError(
                    f"{str(where)!r} says that tensor {name!r} is in {shard!r}, {truth}: fetch index and shards again"
                )

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The one extent of tensor ``name``, absolute in its file. Raises ``KeyError``."""
        return self._pieces[name]

    def read(self, requests: Sequence[ReadRequest]) -> ReadFence:
        """Start reading; ``StoreReadError`` comes out of the fence."""
        return self._reader.read(requests)

    def close(self) -> None:
        """End the threads and close the files. Idempotent."""
        self._reader.close()


def read_header(path: Path) -> Header:
    """The validated header of one file. Raises ``StoreFormatError``."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        start = read_bytes(fd, 8, path)
        if start[:4] == b"PK\x03\x04":
            raise _pickled(path)
        if len(start) < 8:
            raise StoreFormatError(
                f"{str(path)!r} has {size} bytes, a safetensors file needs 8 for the header's length: fetch it again"
            )
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_NBYTES:
            raise StoreFormatError(
                f"{str(path)!r} declares a header of {length} bytes, at most {MAX_HEADER_NBYTES} are allowed: "
                "it is damaged, or no safetensors file: fetch it again"
            )
        if length > size - 8:
            raise StoreFormatError(
                f"{str(path)!r} declares a header of {length} bytes, the file has {size - 8} after the length: "
                "it was cut short: fetch it again"
            )
        raw = read_bytes(fd, length, path)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return parse_header(raw, size, where=str(path))


def parse_header(raw: bytes, file_nbytes: int, *, where: str) -> Header:
    """Validate the JSON part ``raw`` of a file of ``file_nbytes``. ``where`` names the file in errors.

    Raises ``StoreFormatError`` for anything malformed, and for nothing else."""
    start = 8 + len(raw)
    if not raw.startswith(b"{"):
        raise StoreFormatError(f"the header of {where!r} starts with {raw[:1]!r}, b'{{' is needed: fetch it again")
    table = strict_json(raw, f"the header of {where!r}")
    assert isinstance(table, dict)
    metadata = _text_map(table.pop("__metadata__", {}), f"__metadata__ of {where!r}")
    found = [_entry(name, value, file_nbytes - start, where) for name, value in table.items()]
    found.sort(key=lambda item: (item[1].offset, item[1].end))
    at, before = 0, "the header"
    for spec, extent in found:
        if extent.offset != at:
            fault = "overlaps" if extent.offset < at else "leaves a hole after"
            raise StoreFormatError(
                f"tensor {spec.name!r} of {where!r} starts at data byte {extent.offset} and {fault} {before}, "
                f"which ends at {at}: fetch the file again"
            )
        at, before = extent.end, f"tensor {spec.name!r}"
    if at != file_nbytes - start:
        raise StoreFormatError(
            f"the tensors of {where!r} end at data byte {at}, the file has {file_nbytes - start} bytes of data: "
            "they must end together: fetch it again"
        )
    return Header(
        metadata=metadata,
        specs={spec.name: spec for spec, _ in found},
        extents={spec.name: Extent(start + extent.offset, extent.nbytes) for spec, extent in found},
        file_nbytes=file_nbytes,
    )


def _entry(name: str, value: object, data_nbytes: int, where: str) -> tuple[TensorSpec, Extent]:
    what = f"tensor {name!r} of {where!r}"
    _check_name(name, what)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        keys = _short(sorted(value)) if isinstance(value, dict) else f"a JSON {kind_of(value)}"
        raise StoreFormatError(f"{what} needs exactly dtype, shape and data_offsets, has {keys}: fetch the file again")
    dtype = value["dtype"]
    if dtype in _PACKED:
        raise StoreFormatError(
            f"{what} has dtype {dtype}, whose elements are smaller than a byte: convert it to U8 or a wider dtype"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise StoreFormatError(
            f"{what} has dtype {_short(dtype)}, one of {', '.join(DTYPES)} is needed: fetch the file again"
        )
    shape = value["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise StoreFormatError(
            f"{what} has shape {_short(shape)}, a list of ints from 0 is needed: fetch the file again"
        )
    if len(shape) > MAX_RANK:
        raise StoreFormatError(
            f"{what} has {len(shape)} dimensions, at most {MAX_RANK} are possible: fetch the file again"
        )
    spec = TensorSpec(name, DTYPES[dtype], tuple(shape))
    # Zeros left out: torch multiplies the sizes it is given, in 64 bits, before it sees the zero.
    if prod(filter(None, shape)) * spec.itemsize >= 1 << 63:
        raise StoreFormatError(f"{what} has shape {_short(shape)}, which overflows 64 bits: fetch the file again")
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise StoreFormatError(
            f"{what} has data_offsets {_short(offsets)}, a list of two ints is needed: fetch the file again"
        )
    begin, end = offsets
    if not 0 <= begin <= end:
        raise StoreFormatError(
            f"{what} has data_offsets {_short(offsets)}, 0 <= begin <= end is needed: fetch the file again"
        )
    if end > data_nbytes:
        raise StoreFormatError(
            f"{what} ends at data byte {_short(end)}, the file has {data_nbytes} bytes of data: "
            "it was cut short: fetch it again"
        )
    if end - begin != spec.nbytes:
        raise StoreFormatError(
            f"{what} has {end - begin} bytes, {dtype} of shape {_short(shape)} needs {spec.nbytes}: fetch it again"
        )
    return spec, Extent(begin, end - begin)


def _locate(path: Path) -> Path:
    """The index or the single file that ``path`` means."""
    if path.suffix in _PICKLES:
        raise _pickled(path)
    if not os.path.isdir(path):
        return path
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise StoreError(f"cannot list {str(path)!r}: {reason_of(error)}: check its rights") from error
    singles = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(_INDEX)]
    for name in ("model.safetensors", "model" + _INDEX):
        if name in names:
            return path / name
    if len(indices) == 1 or (not indices and len(singles) == 1):
        return path / (indices or singles)[0]
    if indices or singles:
        raise StoreError(
            f"{str(path)!r} holds {len(singles)} safetensors files and {len(indices)} indices, "
            "it is not clear which to read: give the index or the file itself"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise _pickled(path / pickles[0])
    raise StoreError(f"{str(path)!r} holds no .safetensors file: give the folder of a safetensors checkpoint")


def _read_index(path: Path) -> dict[str, str]:
    """Shard by tensor name."""
    fd = open_regular(path)
    try:
        raw = read_bytes(fd, MAX_HEADER_NBYTES + 1, path)
    finally:
        os.close(fd)
    if len(raw) > MAX_HEADER_NBYTES:
        raise StoreFormatError(f"index {str(path)!r} is longer than {MAX_HEADER_NBYTES} bytes: fetch it again")
    table = strict_json(raw, f"index {str(path)!r}")
    if not isinstance(table, dict) or "weight_map" not in table:
        raise StoreFormatError(f"index {str(path)!r} has no weight_map from tensor to shard: fetch it again")
    index = _text_map(table["weight_map"], f"weight_map of {str(path)!r}")
    if not index:
        raise StoreFormatError(f"weight_map of {str(path)!r} names no tensor, at least one is needed: fetch it again")
    for name, shard in index.items():
        _check_name(name, f"tensor {name!r} of {str(path)!r}")
        # Only plain names: the files of a checkpoint lie beside its index. A link there may lead where it likes.
        if shard in ("", ".", "..") or len(shard) > 255 or any(bad in shard for bad in "/\\\0"):
            raise StoreFormatError(
                f"index {str(path)!r} sends tensor {_short(name)} to {_short(shard)}, a file name beside the index "
                "is needed: do not trust this checkpoint"
            )
    for shard in sorted(set(index.values())):
        if shard.endswith(_PICKLES):
            raise _pickled(path.parent / shard)
        if not os.path.lexists(path.parent / shard):
            raise StoreFormatError(
                f"index {str(path)!r} names shard {shard!r}, which is not in {str(path.parent)!r}: fetch the shard"
            )
    return index


def _text_map(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise StoreFormatError(
            f"{what} is a JSON {kind_of(value)}, an object from text to text is needed: fetch it again"
        )
    for key, text in value.items():
        if not isinstance(text, str):
            raise StoreFormatError(f"{what} has a {kind_of(text)} under {key!r}, text is needed: fetch it again")
    return value


def _check_name(name: str, what: str) -> None:
    if not name or len(name) > 4096 or any(ord(mark) < 32 or 0xD800 <= ord(mark) < 0xE000 for mark in name):
        raise StoreFormatError(
            f"{what[:200]}: a tensor's name needs 1 to 4096 characters, none of them control characters or surrogates: "
            "fetch the file again"
        )


def _pickled(path: Path) -> StoreError:
    return StoreError(
        f"{str(path)!r} is a pickle, which can run any program when loaded: no pickle is ever loaded. Convert the "
        "checkpoint where you trust it: load it with transformers and call save_pretrained(folder), "
        "which writes safetensors"
    )


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 100 else f"{text[:100]}..."
