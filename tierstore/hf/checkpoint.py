"""A transformers checkpoint that never exists in memory as a whole."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch.utils._pytree import tree_leaves

from tierstore.budget import format_nbytes
from tierstore.contracts import Store
from tierstore.errors import CheckpointError
from tierstore.extents import Extent
from tierstore.formats.format import Format
from tierstore.hf.converted import converted_store
from tierstore.hf.joined import JoinedStore
from tierstore.hf.placement import Computed, Placed, Run, contiguous_runs, materialise
from tierstore.hf.source import open_source
from tierstore.stores.safetensors import SafetensorsStore
from tierstore.tensors import Piece

READY_NBYTES = 16 << 20
"""Arithmetic of up to this many bytes in all is done in memory when a checkpoint is opened."""


@dataclass(frozen=True)
class Checkpoint:
    """A module on meta, and where each of its weights is.

    ``pieces``, by name of parameter or persistent buffer (``named_parameters()``, so a tied weight has one
    name), cover the contiguous tensor exactly once; ``ready`` holds the values of all other parameters and
    buffers, on the CPU. ``packed`` says which parameters are packed tensors; ``pieces`` has their parts, by names
    such as ``"lm_head.weight.codes"``. ``notes`` say what was converted or left out, and why. ``path`` is the folder
    with config and tokenizer; ``written_nbytes`` is what opening wrote to disk.
    """

    module: torch.nn.Module
    pieces: Mapping[str, tuple[Piece, ...]]
    store: Store
    ready: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]
    path: Path
    written_nbytes: int = 0
    packed: Mapping[str, Format] = field(default_factory=dict)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    model_class: type | None = None,
    trust_remote_code: bool = False,
    store_dir: Path | None = None,
    nvme: int | None = None,
) -> Checkpoint:
    """Open the checkpoint in folder ``path`` without loading it: equal to what ``from_pretrained`` would give.

    ``dtype`` None or ``"auto"`` is the checkpoint's own, as from_pretrained has it: config.json's, else that of
    the first floating tensor. ``model_class`` None is ``AutoModelForCausalLM``, or what ``config.architectures``
    names if that is no decoder of text. Where weights need arithmetic (a cast, a transposition) beyond 16 MiB in
    all, they are converted once into a file below ``store_dir``, of at most ``nvme`` bytes, and found there the
    next time. Nothing is fetched from the network and no pickle is loaded.

    Raises ``CheckpointError`` for a checkpoint that does not fit its model, and ``StoreError`` for one that
    cannot be read. The caller closes ``store``.
    """
    source = open_source(
        path, dtype=dtype, model_class=model_class, trust_remote_code=trust_remote_code, store_dir=store_dir, nvme=nvme
    )
    store, path, notes = source.store, source.path, list(source.notes)
    try:
        runs = {name: contiguous_runs(placed) for name, placed in source.placed.items()}
        arithmetic = {name: _computed_in(made) for name, made in runs.items() if _computed_in(made)}
        why = _reasons(arithmetic)
        if sum(source.placed[name].nbytes for name in arithmetic) <= READY_NBYTES:
            ready = {name: materialise(source.placed[name]) for name in arithmetic}
            pieces = _pieces({name: made for name, made in runs.items() if name not in arithmetic}, {}, 0)
            notes += [f"converted in memory: {line}" for line in why]
            return Checkpoint(
                source.module, pieces, store, {**source.ready, **ready}, tuple(notes), path, source.written_nbytes
            )
        if store_dir is None:
            raise CheckpointError(_refusal(path, arithmetic, why))
        tensors = {
            f"{name}#{number}" if number else name: computed
            for name, sources in arithmetic.items()
            for number, computed in enumerate(sources)
        }
        file, fingerprint = _place_for(path, store_dir, store, tensors)
        made, more = converted_store(file, tensors, fingerprint, nvme=nvme)
        where = {computed: made.pieces(name)[0] for name, computed in tensors.items()}
        notes += [f"converted to {str(file)!r}: {line}" for line in why]
        joined = JoinedStore(store, made)
        pieces = _pieces(runs, where, len(store.paths))
        written = source.written_nbytes + more
        return Checkpoint(source.module, pieces, joined, source.ready, tuple(notes), path, written)
    except BaseException:
        store.close()
        raise


def _computed_in(runs: Sequence[Run]) -> list[Computed]:
    return list(dict.fromkeys(run.source for run in runs if isinstance(run.source, Computed)))


def _pieces(
    runs: Mapping[str, Sequence[Run]], where: Mapping[Computed, Piece], files: int
) -> dict[str, tuple[Piece, ...]]:
    def piece(run: Run) -> Piece:
        if isinstance(run.source, int):
            return Piece(run.source, Extent(run.start, run.nbytes), run.at)
        made = where[run.source]
        return Piece(files + made.file, Extent(made.extent.offset + run.start, run.nbytes), run.at)

    return {name: tuple(piece(run) for run in made) for name, made in runs.items()}


def _reasons(arithmetic: Mapping[str, Sequence[Computed]]) -> list[str]:
    """Lines such as ``"12 weights (1.20 GiB): cast from float32 to bfloat16"``."""
    count: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for sources in arithmetic.values():
        why = " and ".join(sorted({_reason(source) for source in sources}))
        count[why] += 1
        nbytes[why] += sum(source.nbytes for source in sources)
    return [f"{count[why]} weights ({format_nbytes(nbytes[why])}): {why}" for why in count]


def _reason(source: Computed) -> str:
    inner = [part for part in tree_leaves((source.args, source.kwargs)) if isinstance(part, Placed)]
    name = str(source.func).removeprefix("aten.").partition(".")[0]
    if name == "_to_copy":
        return f"cast from {str(inner[0].dtype)[6:]} to {str(source.dtype)[6:]}"
    deeper = {_reason(found) for part in inner for found in _computed_in(part.runs)}
    if name in ("clone", "cat", "stack"):
        return " and ".join(sorted(deeper)) or "rearranged in runs below 4 KiB"
    return " and ".join(sorted(deeper | {name}))


def _refusal(path: Path, arithmetic: Mapping[str, Sequence[Computed]], why: Sequence[str]) -> str:
    names = list(arithmetic)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    need = sum(source.nbytes for sources in arithmetic.values() for source in sources)
    return (
        f"{len(names)} weights of {str(path)!r} need arithmetic before they can be used ({shown}; {'; '.join(why)}), "
        f"which takes {format_nbytes(need)} on disk, once: pass store= with a folder for them, or a dtype= that needs "
        "no cast"
    )


def _place_for(
    path: Path, store_dir: Path, store: SafetensorsStore, tensors: Mapping[str, Computed]
) -> tuple[Path, str]:
    """The file for what is converted, named after checkpoint and need, and the fingerprint of what it comes from."""
    need = repr([(name, str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()])
    name = hashlib.sha256(f"{path.resolve()}\n{need}".encode()).hexdigest()[:16]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in store.paths]
    config = (path / "config.json").read_bytes()
    origin = f"{stats}\n{transformers.__version__}\n{torch.__version__}\n{need}\n".encode() + config
    folder = Path(store_dir) / "converted"
    return folder / f"{path.resolve().name}-{name}.safetensors", hashlib.sha256(origin).hexdigest()
