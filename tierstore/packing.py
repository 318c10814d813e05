"""``pack``: a checkpoint becomes a packed store, a few tensors at a time."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from tierstore import __version__
from tierstore.assembly import Progress, Step, assemble
from tierstore.backends import backend_for
from tierstore.binding.grouping import group_blocks
from tierstore.binding.inventory import find_entries
from tierstore.binding.parameters import parameters_of
from tierstore.budget import format_nbytes
from tierstore.calibrating import Calibrator, fingerprint, read_windows
from tierstore.errors import CheckpointError, StoreError
from tierstore.formats.choosing import choose_formats
from tierstore.formats.format import Format, Parts, pack_tensor, part_specs
from tierstore.formats.named import format_named
from tierstore.hf.packed import check_fit, outline, specs_of
from tierstore.hf.source import Source, open_source
from tierstore.stores.manifest import Manifest, PackedEntry, PackedUnit
from tierstore.stores.packed_writer import PackedWriter, find_packed
from tierstore.tensors import KEEP

UNIT_NBYTES = 256 << 20
"""Packed bytes that lie in one file, unless one tensor has more: as much is made again after a kill."""

MOST_AT_ONCE = 4
"""Tensors packed side by side where there are as many processors: with more, memory would grow with their number."""

BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm")
"""What is copied along with the weights: files of tokenizers and chat templates, by suffix."""
NOT_BESIDE = ("config.json", "tierstore.json")
"""What is made anew, and the seal of an imported ``.gguf``."""
LICENSES = ("LICENSE", "NOTICE", "USE_POLICY")
"""Beginnings of the names of files that must go where weights go."""


@dataclass(frozen=True)
class Packed:
    """What packing did. ``source_nbytes`` are those of the same tensors before. ``steps`` ("read", "pack", "write") are
    of this run, which may have gone on with what another one left; none where nothing was left to do."""

    path: Path
    nbytes: int
    source_nbytes: int
    seconds: float
    steps: Mapping[str, Step]
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Bytes now for each byte before."""
        return self.nbytes / max(self.source_nbytes, 1)

    @property
    def bound(self) -> str:
        """The step that took most time, which the others ran beside; empty where nothing was left to do."""
        return max(self.steps, key=lambda name: self.steps[name].seconds, default="")

    def __str__(self) -> str:
        size = f"{format_nbytes(self.nbytes)}, {self.ratio:.3f} of {format_nbytes(self.source_nbytes)}"
        if not self.bound:
            return f"{self.path} was packed before: {size}"
        rates = ", ".join(f"{name} {format_nbytes(step.rate)}/s" for name, step in self.steps.items())
        return f"{self.path}: {size}, in {self.seconds:.1f} s; {rates}: bound by {self.bound}"


def pack(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "int4",
    formats: Mapping[str, str] | None = None,
    dtype: torch.dtype | str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    store: str | os.PathLike[str] | None = None,
    model_class: type | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Packed:
    """Pack a transformers checkpoint, a folder or a ``.gguf`` file, into the new folder ``out``, for ``load`` to take.

    ``format`` is a format's name or "keep"; ``formats`` chooses by name of the weight: patterns, such as
    ``{"lm_head*": "bf16"}``, come before it. ``dtype`` is what weights are cast to first, by default the
    checkpoint's own; what is not packed is stored in it. ``calibrate`` is a text file, such as what the model will
    read: on it the weights of a decoder's layers are rounded so that they make up for each other's errors, for the
    memory and time that ``tierstore.calibrating`` states. ``device`` packs (default: the current CUDA device, else the
    CPU). A ``.gguf`` is imported below ``store``, by default beside the file. Code from the checkpoint runs, and is
    copied, only with ``trust_remote_code``.

    A few tensors are in memory at a time. ``out`` appears when it is whole; until then ``OUT.part`` beside it is what
    a packing that was killed goes on from when it is asked for again. ``progress`` is told of every tensor written.

    Raises ``CheckpointError``, ``ModuleError`` for formats that do not exist and values that a format has no codes for,
    ``DeviceError``, and ``StoreError`` of what reading and writing meet, ``StoreFullError`` among them.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    where = backend_for(device).device
    for name in (format, *(formats or {}).values()):
        if name != KEEP:
            format_named(name)
    _check_apart(checkpoint, out)
    source = open_source(
        checkpoint,
        dtype=dtype,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        store_dir=None if store is None else Path(store),
    )
    try:
        start = time.perf_counter()
        windows = None if calibrate is None else read_windows(Path(calibrate), source, trust_remote_code)
        plan = plan_packing(source, format, formats or {})
        if windows is not None:
            plan = replace(plan, source={**plan.source, "calibration": fingerprint(windows)})
        files = {"config.json": _config_text(source, plan).encode(), **dict(_files_beside(source, trust_remote_code))}
        steps, notes = _write(source, out, plan, files, windows, where, progress)
        seconds = time.perf_counter() - start
    finally:
        source.store.close()
    return Packed(out, plan.nbytes, plan.source_nbytes, seconds, steps, (*source.notes, *notes))


def plan_packing(source: Source, default: str, patterns: Mapping[str, str]) -> Manifest:
    """Which tensors are stored, in which formats and files; errors and checksums come when they are written.

    Units are the largest subtrees of the module that fit in ``UNIT_NBYTES``. Raises ``ModuleError``.
    """
    module = source.module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    saved = module.state_dict().keys()  # what else is in memory only is computed again by whoever loads
    chosen = choose_formats([described for _, described in parameters_of(module)], default, patterns)
    entries = {
        name: _entry(name, tensor, chosen.get(name, KEEP))
        for name, tensor in tensors.items()
        if name in source.placed or name in saved
    }
    found = [entry for entry in find_entries(module, elsewhere=tensors.keys()) if entry.name in entries]
    groups = group_blocks(
        module,
        {entry.name: dict.fromkeys(at.owner for at in entry.locations) for entry in found},
        {name: entry.nbytes for name, entry in entries.items()},
        limit_nbytes=UNIT_NBYTES,
        leaf_limit_nbytes=UNIT_NBYTES,
    )
    return Manifest(
        source=_identity(source),
        default_format=default,
        units=tuple(PackedUnit(tuple(entries[name] for name in group.blocks)) for group in groups),
        written_by=f"tierstore {__version__}",
    )


def _write(
    source: Source,
    out: Path,
    plan: Manifest,
    files: Mapping[str, bytes],
    windows: Tensor | None,
    device: torch.device,
    progress: Callable[[Progress], None] | None,
) -> tuple[Mapping[str, Step], tuple[str, ...]]:
    """Write what is left of the store, calibrated on ``windows`` if there are any: the steps, and notes on them."""
    if find_packed(out, plan) is not None:
        return {}, ()
    calibrator = None
    if windows is not None:  # before anything is written: not every module can be calibrated
        forms = {name: format_named(entry.format) for name, entry in plan.tensors.items() if entry.format != KEEP}
        calibrator = Calibrator(source.module, source.read, windows, forms, device)
    with PackedWriter(out, plan) as writer:
        for name, content in files.items():
            writer.add_file(name, content)
        write = partial(assemble, source.read, writer, plan, device=device, progress=progress)
        if calibrator is None:
            at_once = min(torch.get_num_threads(), MOST_AT_ONCE) if device.type == "cpu" else 1
            steps = write(_plainly, at_once=at_once)
        else:
            steps = write(calibrator, at_once=1, stop=calibrator.stop)
        writer.finish()
    return steps, calibrator.notes if calibrator is not None else ()


def _plainly(name: str, form: Format, tensor: Tensor) -> Parts:
    return pack_tensor(form, tensor)


def _check_apart(checkpoint: Path, out: Path) -> None:
    there = Path(os.path.realpath(checkpoint))
    folder = there.parent if checkpoint.suffix.lower() == ".gguf" else there
    mine = Path(os.path.realpath(out))
    if mine == folder or (folder == there and folder in mine.parents):
        raise StoreError(
            f"{str(out)!r} is in the checkpoint {str(checkpoint)!r}, which is never changed: give a folder elsewhere"
        )


def _entry(name: str, tensor: Tensor, chosen: str) -> PackedEntry:
    shape = tuple(tensor.shape)
    parts = () if chosen == KEEP else part_specs(format_named(chosen), shape)
    return PackedEntry(name, chosen, str(tensor.dtype).removeprefix("torch."), shape, parts)


def _identity(source: Source) -> dict[str, str]:
    """What the store is packed from. Bytes of weights are not looked at; sizes and times of their files are, and the
    software that may read or round them another way."""
    digest = hashlib.sha256((source.path / "config.json").read_bytes())
    for file in source.store.paths:
        status = file.stat()
        digest.update(f"\n{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    for name, spec in source.store.specs.items():
        digest.update(f"\n{name} {spec.dtype} {spec.shape} {source.store.pieces(name)}".encode())
    return {
        "checkpoint": source.path.resolve().name,
        "sha256": digest.hexdigest(),
        "model": type(source.module).__name__,
        "dtype": str(cast(Any, source.module).config.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _config_text(source: Source, plan: Manifest) -> str:
    """config.json as transformers would save it with the module, so that it names the class and the dtype taken.

    Raises ``CheckpointError`` if what it describes could not be given these weights.
    """
    module: Any = source.module
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    text: str = config.to_json_string()
    again = type(config).from_dict(json.loads(text))
    twin, ready = outline(source.path, again, specs_of(plan.tensors.values()), source.store, type(module), True)
    check_fit(source.path, twin, plan.tensors, ready)
    return text


def _files_beside(source: Source, trust_remote_code: bool) -> Iterator[tuple[str, bytes]]:
    """Names and contents of what the model's users need besides: tokenizer, chat templates, licenses, trusted code."""
    folder = source.path
    found = [file for file in folder.glob("*") if file.suffix in BESIDE or file.name.startswith(LICENSES)]
    found += folder.glob("additional_chat_templates/*.jinja")
    found += folder.glob("**/*.py") if trust_remote_code else ()
    for file in sorted(found):
        name = file.relative_to(folder).as_posix()
        if name not in NOT_BESIDE and not name.endswith(".index.json") and file.is_file():
            yield name, _content(file)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror}: check its rights") from error
