"""Every way we know for a safetensors checkpoint to be wrong: what to write, and what must be said."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierstore.errors import StoreError, StoreFormatError


@dataclass(frozen=True)
class Hostile:
    """``write`` puts it into a folder and returns what to open; opening must raise ``error`` saying ``match``."""

    write: Callable[[Path], Path]
    match: str
    error: type[StoreError] = StoreFormatError


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: object, data: bytes = b"\0" * 8, *, length: int | None = None) -> bytes:
    """A file: ``header`` as JSON, or as the bytes it is."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def file_of(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


def index_of(index: object, shards: dict[str, object] | None = None) -> Callable[[Path], Path]:
    """A folder with an index (an object, or the bytes of the file) and shards (a header each)."""

    def write(folder: Path) -> Path:
        raw = index if isinstance(index, bytes) else json.dumps(index).encode()
        (folder / "model.safetensors.index.json").write_bytes(raw)
        for name, header in (shards or {"a.safetensors": {"w": entry()}}).items():
            (folder / name).write_bytes(packed(header))
        return folder

    return write


def named(content: bytes, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def sends_to(shard: object) -> Callable[[Path], Path]:
    return index_of({"weight_map": {"w": shard}})


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


def fifo_shard(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    return folder


def fifo_index(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors.index.json")
    return folder


def socket_file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(folder, os.O_RDONLY)
        try:  # through the folder's descriptor: a socket's path must be short
            listener.bind(f"/proc/self/fd/{here}/model.safetensors")
        finally:
            os.close(here)
    return path


def folder_shard(folder: Path) -> Path:
    (folder / "a.safetensors").mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    return folder


def loop(folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to("model.safetensors")
    return folder / "model.safetensors"


def device(folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to("/dev/zero")
    return folder / "model.safetensors"


def deep_index(folder: Path) -> Path:
    (folder / "other").mkdir()
    (folder / "other" / "a.safetensors").write_bytes(packed({"w": entry()}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "other/a.safetensors"}}))
    return folder


def pickled_folder(folder: Path) -> Path:
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (folder / "config.json").write_text("{}")
    return folder


def two_files(folder: Path) -> Path:
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(packed({"w": entry()}))
    return folder


GOOD = {"w": entry()}
HOSTILE: dict[str, Hostile] = {
    # the file
    "empty file": Hostile(file_of(b""), "has 0 bytes"),
    "seven bytes": Hostile(file_of(b"\1" * 7), "has 7 bytes"),
    "only a length": Hostile(file_of((2).to_bytes(8, "little")), "cut short"),
    "header of no bytes": Hostile(file_of(packed(b"", b"")), "starts with b''"),
    "header longer than allowed": Hostile(file_of(packed(GOOD, length=100_000_001)), "declares a header of 100000001"),
    "header length of all ones": Hostile(file_of(packed(GOOD, length=2**64 - 1)), "declares a header"),
    "header longer than the file": Hostile(file_of(packed(GOOD, length=10_000)), "cut short"),
    "header length one short": Hostile(file_of(packed(GOOD, length=len(json.dumps(GOOD)) - 1)), "not JSON"),
    "header length one long": Hostile(file_of(packed(GOOD, length=len(json.dumps(GOOD)) + 1)), "not JSON"),
    "data one byte short": Hostile(file_of(packed(GOOD, b"\0" * 7)), "cut short"),
    "data one byte long": Hostile(file_of(packed(GOOD, b"\0" * 9)), "must end together"),
    "no data": Hostile(file_of(packed(GOOD, b"")), "cut short"),
    "data without tensors": Hostile(file_of(packed({})), "must end together"),
    # the JSON
    "not UTF-8": Hostile(file_of(packed(b'{"\xff": 1}')), "not UTF-8 at byte 2"),
    "UTF-8 with a mark": Hostile(file_of(packed(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())), "starts with"),
    "space before the JSON": Hostile(file_of(packed(b" " + json.dumps(GOOD).encode())), "starts with b' '"),
    "no JSON": Hostile(file_of(packed(b"{hello")), "not JSON"),
    "two documents": Hostile(file_of(packed(b"{}{}")), "not JSON"),
    "zeros after the JSON": Hostile(file_of(packed(json.dumps(GOOD).encode() + b"\0\0")), "not JSON"),
    "nested too deep": Hostile(file_of(packed(b'{"a":' * 200_000)), "not JSON"),
    "arrays nested too deep": Hostile(file_of(packed(b'{"a":' + b"[" * 500_000)), "not JSON"),
    "an array": Hostile(file_of(packed([GOOD])), "starts with"),
    "null": Hostile(file_of(packed(None)), "starts with"),
    "a number": Hostile(file_of(packed(b"7")), "starts with"),
    "a tensor twice": Hostile(
        file_of(packed(b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}")),
        "key 'w' twice",
    ),
    "a dtype twice": Hostile(
        file_of(packed(b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}')), "key 'dtype' twice"
    ),
    "NaN": Hostile(file_of(packed(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}')), "NaN"),
    "Infinity": Hostile(file_of(packed(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}')), "Infinity"),
    "a number of a million digits": Hostile(
        file_of(packed(b'{"w":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,8]}}')), "not JSON"
    ),
    # metadata
    "metadata is text": Hostile(file_of(packed({"__metadata__": "x", **GOOD})), "__metadata__ of .* JSON string"),
    "metadata holds a number": Hostile(file_of(packed({"__metadata__": {"a": 1}, **GOOD})), "number under 'a'"),
    "metadata is null": Hostile(file_of(packed({"__metadata__": None, **GOOD})), "JSON null"),
    # names
    "an empty name": Hostile(file_of(packed({"": entry()})), "name needs"),
    "a name with a zero": Hostile(file_of(packed({"a\0b": entry()})), "name needs"),
    "half a character in a name": Hostile(
        file_of(packed(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}")), "name needs"
    ),
    "an endless name": Hostile(file_of(packed({"w" * 5000: entry()})), "name needs"),
    # a tensor's entry
    "an entry is a list": Hostile(file_of(packed({"w": [1]})), "JSON array"),
    "an entry without dtype": Hostile(file_of(packed({"w": {"shape": [2], "data_offsets": [0, 8]}})), "needs exactly"),
    "an entry without shape": Hostile(
        file_of(packed({"w": {"dtype": "F32", "data_offsets": [0, 8]}})), "needs exactly"
    ),
    "an entry without offsets": Hostile(file_of(packed({"w": {"dtype": "F32", "shape": [2]}})), "needs exactly"),
    "an entry with more": Hostile(file_of(packed({"w": {**entry(), "stride": [1]}})), "needs exactly"),
    "an unknown dtype": Hostile(file_of(packed({"w": entry(dtype="F23")})), "dtype 'F23'"),
    "a dtype in small letters": Hostile(file_of(packed({"w": entry(dtype="f32")})), "dtype 'f32'"),
    "a dtype that is a list": Hostile(file_of(packed({"w": entry(dtype=["F32"])})), "dtype"),
    "a dtype that is null": Hostile(file_of(packed({"w": entry(dtype=None)})), "dtype None"),
    "a dtype below a byte": Hostile(file_of(packed({"w": entry(dtype="F4", shape=[16])})), "smaller than a byte"),
    "a dtype of six bits": Hostile(file_of(packed({"w": entry(dtype="F6_E2M3", shape=[4])})), "smaller than a byte"),
    "a shape that is a number": Hostile(file_of(packed({"w": entry(shape=2)})), "shape 2"),
    "a shape of text": Hostile(file_of(packed({"w": entry(shape=["2"])})), "list of ints"),
    "a shape below zero": Hostile(file_of(packed({"w": entry(shape=[-2])})), "list of ints"),
    "two sizes below zero": Hostile(file_of(packed({"w": entry(shape=[-1, -2])})), "list of ints"),
    "a shape of fractions": Hostile(file_of(packed({"w": entry(shape=[2.0])})), "list of ints"),
    "a shape of truths": Hostile(file_of(packed({"w": entry(shape=[True, 2])})), "list of ints"),
    "a shape that overflows": Hostile(file_of(packed({"w": entry(shape=[2**32, 2**32])})), "overflows"),
    "a size that overflows": Hostile(file_of(packed({"w": entry(shape=[2**64])})), "overflows"),
    "an empty shape that overflows": Hostile(file_of(packed({"w": entry(shape=[2**62, 2**62, 0])})), "overflows"),
    "a thousand dimensions": Hostile(file_of(packed({"w": entry(shape=[1] * 1000)})), "1000 dimensions"),
    "a million dimensions": Hostile(file_of(packed({"w": entry(shape=[9999999] * 1_000_000)})), "1000000 dimensions"),
    "a shape too large for its bytes": Hostile(file_of(packed({"w": entry(shape=[3])})), "needs 12"),
    "a shape too small for its bytes": Hostile(file_of(packed({"w": entry(shape=[1])})), "needs 4"),
    # offsets
    "offsets that are null": Hostile(file_of(packed({"w": entry(offsets=None)})), "list of two ints"),
    "three offsets": Hostile(file_of(packed({"w": entry(offsets=[0, 4, 8])})), "list of two ints"),
    "offsets of fractions": Hostile(file_of(packed({"w": entry(offsets=[0, 8.0])})), "list of two ints"),
    "offsets of truths": Hostile(file_of(packed({"w": entry(offsets=[False, 8])})), "list of two ints"),
    "offsets below zero": Hostile(file_of(packed({"w": entry(offsets=[-8, 0])})), "0 <= begin"),
    "offsets backwards": Hostile(file_of(packed({"w": entry(offsets=[8, 0])})), "0 <= begin"),
    "offsets beyond the file": Hostile(file_of(packed({"w": entry(offsets=[0, 2**60])})), "cut short"),
    "offsets of 300 digits": Hostile(file_of(packed({"w": entry(offsets=[10**300, 10**300 + 8])})), "cut short"),
    "two tensors in one place": Hostile(file_of(packed({"a": entry(), "b": entry()})), "overlaps tensor 'a'"),
    "tensors that overlap": Hostile(
        file_of(packed({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12)), "overlaps tensor 'a'"
    ),
    "a hole between tensors": Hostile(
        file_of(packed({"a": entry(), "b": entry(offsets=[9, 17])}, b"\0" * 17)), "leaves a hole after tensor 'a'"
    ),
    "a hole before the first": Hostile(
        file_of(packed({"a": entry(offsets=[1, 9])}, b"\0" * 9)), "hole after the header"
    ),
    "an empty tensor in a tensor": Hostile(
        file_of(packed({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])})), "overlaps tensor 'a'"
    ),
    # an index
    "index is no JSON": Hostile(index_of(b"{"), "not JSON"),
    "index is not UTF-8": Hostile(index_of(b'{"weight_map": {"\xff": "a"}}'), "not UTF-8"),
    "index is a list": Hostile(index_of([]), "no weight_map"),
    "index without a map": Hostile(index_of({"metadata": {}}), "no weight_map"),
    "map is a list": Hostile(index_of({"weight_map": ["w"]}), "JSON array"),
    "map is empty": Hostile(index_of({"weight_map": {}}), "names no tensor"),
    "map to a number": Hostile(sends_to(1), "number under 'w'"),
    "map names a tensor twice": Hostile(
        index_of(b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}'), "key 'w' twice"
    ),
    "shard above": Hostile(sends_to("../a.safetensors"), "beside the index"),
    "shard at the root": Hostile(sends_to("/etc/passwd"), "beside the index"),
    "shard up and down": Hostile(sends_to("a/../../b.safetensors"), "beside the index"),
    "shard that is the parent": Hostile(sends_to(".."), "beside the index"),
    "shard that is the folder": Hostile(sends_to("."), "beside the index"),
    "shard without a name": Hostile(sends_to(""), "beside the index"),
    "shard with a zero": Hostile(sends_to("a.safetensors\0.txt"), "beside the index"),
    "shard with backslashes": Hostile(sends_to("..\\a.safetensors"), "beside the index"),
    "shard in a folder": Hostile(deep_index, "beside the index"),
    "shard is missing": Hostile(sends_to("b.safetensors"), "fetch the shard"),
    "shard with an endless name": Hostile(sends_to("b" * 5000), "beside the index"),
    "shard lacks the tensor": Hostile(index_of({"weight_map": {"x": "a.safetensors"}}), "no shard has it"),
    "tensor is in the other shard": Hostile(
        index_of(
            {"weight_map": {"w": "b.safetensors", "v": "a.safetensors"}},
            {"a.safetensors": {"w": entry()}, "b.safetensors": {"v": entry()}},
        ),
        "it is in 'a.safetensors'",
    ),
    "tensor is in two shards": Hostile(
        index_of(
            {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}},
            {
                "a.safetensors": {"w": entry()},
                "b.safetensors": {"w": entry(shape=[1], offsets=[0, 4]), "v": entry(shape=[1], offsets=[4, 8])},
            },
        ),
        "is in two shards",
    ),
    "shard is damaged": Hostile(
        index_of({"weight_map": {"w": "a.safetensors"}}, {"a.safetensors": {"w": entry(shape=[3])}}), "needs 12"
    ),
    # what is no file
    "a FIFO": Hostile(fifo, "is a FIFO", StoreError),
    "a FIFO as shard": Hostile(fifo_shard, "is a FIFO", StoreError),
    "a FIFO as index": Hostile(fifo_index, "is a FIFO", StoreError),
    "a device": Hostile(device, "is a device", StoreError),
    "a socket": Hostile(socket_file, "cannot open", StoreError),
    "a folder as shard": Hostile(folder_shard, "is a folder", StoreError),
    "a link to itself": Hostile(loop, "cannot open", StoreError),
    "nothing": Hostile(lambda folder: folder / "model.safetensors", "cannot open", StoreError),
    "an empty folder": Hostile(lambda folder: folder, "no .safetensors file", StoreError),
    "a path with a zero": Hostile(lambda folder: folder / "a\0b", "cannot open", StoreError),
    "two files without an index": Hostile(two_files, "2 safetensors files", StoreError),
    # pickles
    "a pickle": Hostile(named(b"\x80\x02.", "pytorch_model.bin"), "no pickle is ever loaded", StoreError),
    "a folder of pickles": Hostile(pickled_folder, "no pickle is ever loaded", StoreError),
    "a pickle under another name": Hostile(file_of(b"PK\x03\x04" + b"\0" * 60), "no pickle is ever loaded", StoreError),
    "an index of pickles": Hostile(sends_to("pytorch_model-00001.bin"), "save_pretrained", StoreError),
}
