"""A small packed store, and every way we know for one to be wrong: what to change, and what must be said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tierstore.errors import ChecksumError, StoreError, StoreFormatError, StoreIncompleteError
from tierstore.stores.manifest import Manifest, PackedEntry, PackedUnit, text_crc32c
from tierstore.stores.packed_files import WINDOW
from tierstore.stores.packed_writer import PackedWriter
from tierstore.tensors import TensorSpec

Json = dict[str, Any]
FILES = {"config.json": b'{"model_type": "tiny"}', "extra/chat.jinja": b"{{ messages }}"}


def sample(seed: int = 0) -> dict[str, dict[str, torch.Tensor] | torch.Tensor]:
    """Packed and kept tensors: one wider than two windows, some smaller than a page, one empty, one scalar."""
    random = torch.Generator().manual_seed(seed)

    def raw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)

    return {
        "embed.weight": raw(700, 4000),
        "layers.0.q.weight": {"codes": raw(64, 100), "scales": raw(64, 16).view(torch.float32)},
        "layers.0.norm": raw(2 * 33).view(torch.bfloat16),
        "layers.0.empty": torch.empty(0, 3),
        "layers.1.q.weight": {"codes": raw(64, 100), "scales": raw(64, 16).view(torch.float32)},
        "count": torch.tensor(7),
    }


UNITS = (
    ("embed.weight",),
    ("layers.0.q.weight", "layers.0.norm", "layers.0.empty"),
    ("layers.1.q.weight", "count"),
)
"""Names of ``sample()`` by unit."""


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def plan_of(
    tensors: Mapping[str, Mapping[str, torch.Tensor] | torch.Tensor],
    units: tuple[tuple[str, ...], ...],
    *,
    source: Mapping[str, str] | None = None,
) -> Manifest:
    def entry(name: str) -> PackedEntry:
        data = tensors[name]
        if isinstance(data, torch.Tensor):
            spec = spec_of(name, data)
            return PackedEntry(name, "keep", spec.dtype, spec.shape, ())
        parts = tuple(spec_of(part, tensor) for part, tensor in data.items())
        return PackedEntry(name, "int4", "bfloat16", (64, 200), parts)

    made = tuple(PackedUnit(tuple(entry(name) for name in names)) for names in units)
    return Manifest(source or {"checkpoint": "tiny", "revision": "1"}, "int4", made, written_by="tests")


def fill(
    writer: PackedWriter, tensors: Mapping[str, Any], plan: Manifest, units: tuple[int, ...] | None = None
) -> None:
    for number in writer.left if units is None else units:
        with writer.unit(number) as unit:
            for entry in plan.units[number].tensors:
                error = None if entry.format == "keep" else 0.125 + number
                unit.add(entry.name, tensors[entry.name], relative_error=error)


def pack(out: Path, *, seed: int = 0, source: Mapping[str, str] | None = None) -> Manifest:
    """The sample as a whole packed store at ``out``."""
    tensors = sample(seed)
    plan = plan_of(tensors, UNITS, source=source)
    with PackedWriter(out, plan) as writer:
        fill(writer, tensors, plan)
        for name, content in FILES.items():
            writer.add_file(name, content)
        return writer.finish()


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def signed(mine: Json) -> Json:
    """What the group's attributes become with the checksum that suits them."""
    mine.pop("crc32c", None)
    text = json.dumps(mine, sort_keys=True, separators=(",", ":"))
    return {**mine, "crc32c": f"{text_crc32c(text.encode()):08x}"}


@dataclass(frozen=True)
class Wrong:
    """``change`` damages the store in a folder; opening must raise ``error`` saying ``match``."""

    change: Callable[[Path], object]
    match: str
    error: type[StoreError] = StoreFormatError


def group_text(text: bytes) -> Callable[[Path], None]:
    return lambda out: write(out / "weights.zarr" / "zarr.json", text)


def write(path: Path, text: bytes) -> None:
    path.write_bytes(text)


def group(change: Callable[[Json], object], *, sign: bool = True) -> Callable[[Path], None]:
    """Changes the manifest, and signs it anew."""

    def apply(out: Path) -> None:
        path = out / "weights.zarr" / "zarr.json"
        document = json.loads(path.read_text())
        mine = document["attributes"]["tierstore"]
        change(mine)
        document["attributes"]["tierstore"] = signed(mine) if sign else mine
        path.write_text(json.dumps(document))

    return apply


def document(change: Callable[[Json], object]) -> Callable[[Path], None]:
    """Changes the group's document around the manifest."""

    def apply(out: Path) -> None:
        path = out / "weights.zarr" / "zarr.json"
        whole = json.loads(path.read_text())
        change(whole)
        path.write_text(json.dumps(whole))

    return apply


def tensor(change: Callable[[Json], object], unit: int = 1, number: int = 0) -> Callable[[Path], None]:
    return group(lambda mine: change(mine["units"][unit]["tensors"][number]))


def part(change: Callable[[Json], object]) -> Callable[[Path], None]:
    return tensor(lambda entry: change(entry["parts"][0]))


def unit(change: Callable[[Json], object], number: int = 1) -> Callable[[Path], None]:
    """Changes a unit's document (given whole), and lets the manifest vouch for it."""

    def apply(out: Path) -> None:
        path = out / "weights.zarr" / f"unit-{number:05d}" / "zarr.json"
        whole = json.loads(path.read_text())
        change(whole)
        path.write_text(json.dumps(whole))
        crc = f"{text_crc32c(path.read_bytes()):08x}"
        group(lambda mine: mine["units"][number].update(zarr_json_crc32c=crc))(out)

    return apply


def mine(change: Callable[[Json], object]) -> Callable[[Path], None]:
    return unit(lambda whole: change(whole["attributes"]["tierstore"]))


def placed(**changed: Any) -> Callable[[Path], None]:
    """Changes the second part of unit 1."""
    return mine(lambda mine: mine["parts"][1].update(changed))


def data(change: Callable[[Path], object], number: int = 1, name: str = "c/0") -> Callable[[Path], object]:
    return lambda out: change(out / "weights.zarr" / f"unit-{number:05d}" / name)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def other_unit(number: int, **options: Any) -> Callable[[Path], None]:
    """Puts a whole unit of another store in the place of unit 1."""

    def apply(out: Path) -> None:
        other = out.with_name("other")
        pack(other, **options)
        mine = out / "weights.zarr" / "unit-00001"
        shutil.rmtree(mine)
        shutil.copytree(other / "weights.zarr" / f"unit-{number:05d}", mine)

    return apply


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def half_packed(out: Path) -> None:
    plan = plan_of(sample(), UNITS)
    shutil.rmtree(out)
    with PackedWriter(out, plan) as writer:
        fill(writer, sample(), plan, (0, 2))


def weights_file(out: Path) -> None:
    shutil.rmtree(out / "weights.zarr")
    (out / "weights.zarr").touch()


def renamed_early(out: Path) -> None:
    half_packed(out)
    os.rename(out.with_name(out.name + ".part") / "store", out)


def twice(mine: Json) -> None:
    mine["units"][2]["tensors"][0]["name"] = "layers.0.q.weight"


def clash(mine: Json) -> None:
    mine["units"][2]["tensors"][1]["name"] = "layers.0.q.weight.codes"


def huge_sum(mine: Json) -> None:
    for number in (0, 1, 2):
        entry = mine["units"][number]["tensors"][0]
        entry.update(format="keep", parts=[], dtype="uint8", shape=[(1 << 62) - 1])
        mine["units"][number].update(tensors=[entry], nbytes=1 << 62)


def path_named(name: str) -> Callable[[Path], None]:
    return group(lambda mine: mine["files"].update({name: {"nbytes": 1, "crc32c": "00000000"}}))


DEEP = b'{"attributes": {"tierstore": ' + b"[" * 200_000 + b"]" * 200_000 + b"}}"
NOT_OURS = "not the group document"

WRONG: dict[str, Wrong] = {
    # the group's document
    "no JSON": Wrong(group_text(b"{"), "not JSON"),
    "an empty document": Wrong(group_text(b""), "not JSON"),
    "not UTF-8": Wrong(group_text(b"\xff"), "not UTF-8"),
    "deep nesting": Wrong(group_text(DEEP), "not JSON"),
    "a number of 5000 digits": Wrong(group_text(b'{"zarr_format": ' + b"9" * 5000 + b"}"), "not JSON"),
    "no number": Wrong(group_text(b'{"zarr_format": NaN}'), "which is not JSON"),
    "a key twice": Wrong(group_text(b'{"zarr_format": 3, "zarr_format": 3}'), "'zarr_format' twice"),
    "a list": Wrong(group_text(b"[]"), NOT_OURS),
    "a document cut short": Wrong(lambda out: os.truncate(out / "weights.zarr" / "zarr.json", 400), "not JSON"),
    "an array": Wrong(document(lambda whole: whole.update(node_type="array")), NOT_OURS),
    "Zarr 2": Wrong(document(lambda whole: whole.update(zarr_format=2)), NOT_OURS),
    "no attributes": Wrong(document(lambda whole: whole.pop("attributes")), NOT_OURS),
    "attributes of someone else": Wrong(document(lambda whole: whole.update(attributes={"x": 1})), NOT_OURS),
    "attributes of someone else too": Wrong(document(lambda whole: whole["attributes"].update(x=1)), NOT_OURS),
    "something else in the document": Wrong(document(lambda whole: whole.update(x=1)), NOT_OURS),
    "a manifest of text": Wrong(document(lambda whole: whole["attributes"].update(tierstore="x")), NOT_OURS),
    # the manifest
    "a newer layout": Wrong(group(lambda m: m.update(layout_version=3, new={})), "reads 2: upgrade tierstore"),
    "an older layout": Wrong(group(lambda m: m.update(layout_version=1)), "version 1, .* reads 2: pack"),
    "a huge layout": Wrong(group(lambda m: m.update(layout_version=10**300)), "upgrade tierstore"),
    "layout 0": Wrong(group(lambda m: m.update(layout_version=0)), "an int from 1"),
    "layout true": Wrong(group(lambda m: m.update(layout_version=True)), "an int from 1"),
    "layout of text": Wrong(group(lambda m: m.update(layout_version="2")), "an int from 1"),
    "no layout": Wrong(group(lambda m: m.pop("layout_version")), "layout_version None"),
    "no source": Wrong(group(lambda m: m.pop("source")), "needs exactly"),
    "one key more": Wrong(group(lambda m: m.update(more=1)), "needs exactly"),
    "a source of text": Wrong(group(lambda m: m.update(source="x")), "source .* is a JSON string, an object"),
    "a source of numbers": Wrong(group(lambda m: m.update(source={"x": 1})), "'x' in the source .* JSON number"),
    "a writer that is a number": Wrong(group(lambda m: m.update(written_by=1)), "written_by .* a string is needed"),
    "a default that is null": Wrong(group(lambda m: m.update(default_format=None)), "default_format .* is None"),
    "a default with spaces": Wrong(group(lambda m: m.update(default_format="int 4")), "'int 4', a format's name"),
    "units of text": Wrong(group(lambda m: m.update(units="x")), "units .* are a JSON string"),
    "units by name": Wrong(group(lambda m: m.update(units={})), "units .* are a JSON object"),
    "bytes of text": Wrong(group(lambda m: m.update(nbytes="1")), "nbytes of .* is '1'"),
    "bytes that are a fraction": Wrong(group(lambda m: m.update(nbytes=1.0)), "nbytes of .* is 1.0"),
    "bytes below zero": Wrong(group(lambda m: m.update(nbytes=-1)), "nbytes of .* is -1"),
    "bytes of 300 digits": Wrong(group(lambda m: m.update(nbytes=10**300)), "whole number from 0 below 2"),
    "other bytes in all": Wrong(group(lambda m: m.update(nbytes=4096)), "4096 bytes in all"),
    "a checksum of text": Wrong(group(lambda m: m.update(crc32c="x"), sign=False), "crc32c of .* 8 hexadecimal"),
    "a checksum in capitals": Wrong(group(lambda m: m.update(crc32c="ABCDEF00"), sign=False), "8 hexadecimal"),
    "a checksum that is a number": Wrong(group(lambda m: m.update(crc32c=1), sign=False), "8 hexadecimal"),
    "a manifest edited": Wrong(
        group(lambda m: m["source"].update(revision="2"), sign=False), "was changed", ChecksumError
    ),
    # units in the manifest
    "a unit that is null": Wrong(group(lambda m: m["units"].append(None)), "unit 3 .* JSON null"),
    "a unit of another name": Wrong(group(lambda m: m["units"][1].update(name="unit-00002")), "'unit-00001' is needed"),
    "a unit above": Wrong(group(lambda m: m["units"][1].update(name="../x")), "'unit-00001' is needed"),
    "units in another order": Wrong(group(lambda m: m["units"].reverse()), "'unit-00000' is needed"),
    "a unit of nothing": Wrong(group(lambda m: m["units"][1].update(tensors=[])), "holds no tensor"),
    "a unit without bytes": Wrong(group(lambda m: m["units"][1].pop("nbytes")), "needs exactly"),
    "a unit of other bytes": Wrong(group(lambda m: m["units"][1].update(nbytes=1)), "says it has 1 bytes"),
    "a unit's checksum is null": Wrong(group(lambda m: m["units"][1].update(zarr_json_crc32c=None)), "8 hexadecimal"),
    "units that overflow together": Wrong(group(huge_sum), "which overflows"),
    # tensors in the manifest
    "a tensor that is text": Wrong(group(lambda m: m["units"][1]["tensors"].append("x")), "JSON string, an object"),
    "a tensor without a format": Wrong(tensor(lambda e: e.pop("format")), "needs exactly"),
    "a tensor without a name": Wrong(tensor(lambda e: e.update(name="")), "name of 0 characters"),
    "a name that is a number": Wrong(tensor(lambda e: e.update(name=1)), "JSON number, a string"),
    "a name with a line break": Wrong(tensor(lambda e: e.update(name="a\nb")), "control characters"),
    "a name of half a character": Wrong(tensor(lambda e: e.update(name="\ud800")), "surrogates"),
    "an endless name": Wrong(tensor(lambda e: e.update(name="x" * 5000)), "name of 5000 characters"),
    "an unknown dtype": Wrong(tensor(lambda e: e.update(dtype="float7")), "dtype 'float7'"),
    "a dtype that is a list": Wrong(tensor(lambda e: e.update(dtype=[])), r"dtype \[\]"),
    "a shape of text": Wrong(tensor(lambda e: e.update(shape="64")), "shape '64'"),
    "a shape below zero": Wrong(tensor(lambda e: e.update(shape=[-64, -200])), "ints from 0"),
    "a shape of truths": Wrong(tensor(lambda e: e.update(shape=[True, 200])), "ints from 0"),
    "a shape of fractions": Wrong(tensor(lambda e: e.update(shape=[64.0, 200])), "ints from 0"),
    "a shape that overflows": Wrong(tensor(lambda e: e.update(shape=[2**40, 2**40])), "overflows 64 bits"),
    "an empty shape that overflows": Wrong(tensor(lambda e: e.update(shape=[2**62, 0])), "overflows 64 bits"),
    "a hundred dimensions": Wrong(tensor(lambda e: e.update(shape=[1] * 100)), "100 dimensions"),
    "a format that is a number": Wrong(tensor(lambda e: e.update(format=4)), "is 4, a format's name"),
    "a format that is a path": Wrong(tensor(lambda e: e.update(format="../int4")), "a format's name"),
    "an error below zero": Wrong(tensor(lambda e: e.update(relative_error=-0.1)), "relative_error -0.1"),
    "an error that is true": Wrong(tensor(lambda e: e.update(relative_error=True)), "relative_error True"),
    "an error of text": Wrong(tensor(lambda e: e.update(relative_error="0")), "relative_error '0'"),
    "an endless error": Wrong(tensor(lambda e: e.update(relative_error=10**400)), "relative_error 10000"),
    "parts that are text": Wrong(tensor(lambda e: e.update(parts="codes")), "parts .* JSON string"),
    "a packed tensor without parts": Wrong(tensor(lambda e: e.update(parts=[])), "'int4' and has 0 parts, 1 to 16"),
    "a thousand parts": Wrong(tensor(lambda e: e.update(parts=e["parts"] * 500)), "has 1000 parts"),
    "a kept tensor with parts": Wrong(tensor(lambda e: e.update(format="keep")), "'keep' and has 2 parts, none"),
    "a part with a dot": Wrong(part(lambda p: p.update(name="a.b")), "part named 'a.b'"),
    "a part without a dtype": Wrong(part(lambda p: p.pop("dtype")), "needs exactly"),
    "a part of another shape": Wrong(part(lambda p: p.update(shape=[64, 10**4])), "says it has"),
    "a tensor twice": Wrong(group(twice), "the tensor 'layers.0.q.weight' twice"),
    "a tensor like a part": Wrong(group(clash), "the stored tensor 'layers.0.q.weight.codes' twice"),
    # files in the manifest
    "files that are a list": Wrong(group(lambda m: m.update(files=[])), "files .* JSON array"),
    "a file without a checksum": Wrong(group(lambda m: m["files"].update(a={"nbytes": 1})), "needs exactly"),
    "a file above": Wrong(path_named("../config.json"), "do not trust"),
    "a file at the root": Wrong(path_named("/etc/passwd"), "do not trust"),
    "a file with a zero": Wrong(path_named("a\0b"), "do not trust"),
    "a file in the middle above": Wrong(path_named("a/../../b"), "do not trust"),
    "a file among the weights": Wrong(path_named("weights.zarr/zarr.json"), "do not trust"),
    "a file without a name": Wrong(path_named(""), "do not trust"),
    "a file of half a character": Wrong(path_named("\udc00"), "do not trust"),
    # a unit's document
    "a unit's document cut short": Wrong(data(lambda p: os.truncate(p, 99), name="zarr.json"), "not JSON"),
    "a unit's document of zeros": Wrong(data(lambda p: p.write_bytes(bytes(900)), name="zarr.json"), "not JSON"),
    "a unit's document is missing": Wrong(data(Path.unlink, name="zarr.json"), "is missing", StoreIncompleteError),
    "a unit without parts": Wrong(mine(lambda m: m.pop("parts")), "not the document of a packed store's unit"),
    "parts by name": Wrong(mine(lambda m: m.update(parts={})), "not the document of a packed store's unit"),
    "a part too few": Wrong(mine(lambda m: m["parts"].pop()), "no whole description of part 'layers.0.empty'"),
    "a part too many": Wrong(mine(lambda m: m["parts"].append(m["parts"][0])), "has 5 parts, the manifest has 4"),
    "a part that is null": Wrong(mine(lambda m: m["parts"].insert(0, None)), "no whole description"),
    "a part of another name": Wrong(placed(name="x"), "part 'x' .* of another model"),
    "a part of another dtype": Wrong(placed(dtype="int32"), "is 'int32' .* of another model"),
    "a part of another size": Wrong(placed(shape=[4, 64]), r"shape \[4, 64\] .* of another model"),
    "a part off the grid": Wrong(placed(offset=100), "a multiple of 4096"),
    "a part below zero": Wrong(placed(offset=-4096), "a multiple of 4096"),
    "a part in another": Wrong(placed(offset=4096), "overlaps the one before"),
    "a part beyond the end": Wrong(placed(offset=1 << 40), "the unit has 16384"),
    "a part after a hole": Wrong(placed(offset=12288), "are needed"),
    "a part of other bytes": Wrong(placed(nbytes=1025), "1025 bytes at 8192"),
    "an offset that is a fraction": Wrong(placed(offset=8192.5), "no whole description"),
    "a checksum too few": Wrong(mine(lambda m: m.update(crc32c=[])), "0 checksums, 1 are needed"),
    "a million checksums": Wrong(mine(lambda m: m.update(crc32c=m["crc32c"] * 10**6)), "1000000 checksums"),
    "a checksum of a unit in capitals": Wrong(mine(lambda m: m.update(crc32c=["ABCDEF00"])), "checksum 'ABCDEF00'"),
    "another window": Wrong(mine(lambda m: m.update(window_nbytes=2 * WINDOW)), "something else"),
    "another relative error": Wrong(
        mine(lambda m: m["relative_errors"].update({"layers.0.q.weight": 0.5})), "has CRC32C", ChecksumError
    ),
    "a relative error of nothing": Wrong(mine(lambda m: m["relative_errors"].update(x=0.5)), "something else"),
    "a relative error of text": Wrong(mine(lambda m: m["relative_errors"].update(x="0.5")), "relative error '0.5'"),
    "a unit of another dtype": Wrong(unit(lambda whole: whole.update(data_type="int8")), "something else"),
    "a unit of another shape": Wrong(unit(lambda whole: whole.update(shape=[5])), "something else"),
    "a compressed unit": Wrong(unit(lambda whole: whole["codecs"].append({"name": "zstd"})), "something else"),
    "a unit in two chunks": Wrong(
        unit(lambda whole: whole["chunk_grid"].update(configuration={"chunk_shape": [8192]})), "something else"
    ),
    "a unit of another model": Wrong(other_unit(2), "of another model or packing"),
    "a unit of another packing": Wrong(other_unit(1, seed=1), "of another packing", ChecksumError),
    # files
    "a unit is missing": Wrong(
        lambda out: shutil.rmtree(out / "weights.zarr" / "unit-00001"), "is missing", StoreIncompleteError
    ),
    "data is missing": Wrong(data(Path.unlink), "is missing", StoreIncompleteError),
    "data is empty": Wrong(data(lambda path: os.truncate(path, 0)), "0 bytes, 16384 were", StoreIncompleteError),
    "data is cut short": Wrong(data(lambda path: os.truncate(path, 16383)), "cut short", StoreIncompleteError),
    "data is longer": Wrong(data(longer), "has 16385 bytes, 16384 were written"),
    "data is a FIFO": Wrong(data(instead(os.mkfifo)), "is a FIFO", StoreError),
    "data is a folder": Wrong(data(instead(Path.mkdir)), "is a folder", StoreError),
    "data is a device": Wrong(data(instead(zeros)), "is a device", StoreError),
    "data is a link to nothing": Wrong(data(instead(lambda path: path.symlink_to("x"))), "cannot open", StoreError),
    "data is a link to itself": Wrong(data(instead(lambda path: path.symlink_to("0"))), "cannot open", StoreError),
    "a unit's document is a FIFO": Wrong(data(instead(os.mkfifo), name="zarr.json"), "is a FIFO", StoreError),
    "the group's document is missing": Wrong(
        lambda out: (out / "weights.zarr" / "zarr.json").unlink(), "not packed or copied", StoreIncompleteError
    ),
    "the group's document is a FIFO": Wrong(
        lambda out: instead(os.mkfifo)(out / "weights.zarr" / "zarr.json"), "is a FIFO", StoreError
    ),
    "the weights are a file": Wrong(
        weights_file,
        "not packed or copied",
        StoreIncompleteError,
    ),
    "the weights are missing": Wrong(
        lambda out: shutil.rmtree(out / "weights.zarr"), "holds no weights.zarr", StoreError
    ),
    "nothing": Wrong(shutil.rmtree, "holds no weights.zarr", StoreError),
    "half packed": Wrong(half_packed, "is half packed, in .*OUT.part'", StoreIncompleteError),
    "half packed and renamed": Wrong(renamed_early, "not packed or copied", StoreIncompleteError),
}


def truth_of(tensors: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes of every stored tensor."""
    flat: dict[str, torch.Tensor] = {}
    for name, data in tensors.items():
        flat.update({name: data} if isinstance(data, torch.Tensor) else {f"{name}.{p}": t for p, t in data.items()})
    return {name: bytes(t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in flat.items()}


def without_errors(manifest: Manifest) -> Manifest:
    units = tuple(PackedUnit(tuple(replace(e, relative_error=None) for e in u.tensors)) for u in manifest.units)
    return replace(manifest, units=units, files={})
