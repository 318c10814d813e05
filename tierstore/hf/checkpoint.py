"""A transformers checkpoint that never exists in memory as a whole."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tierstore.budget import format_nbytes
from tierstore.contracts import Store
from tierstore.errors import CheckpointError
from tierstore.extents import Extent
from tierstore.hf.converted import converted_store
from tierstore.hf.joined import JoinedStore
from tierstore.hf.model import read_config, trace
from tierstore.hf.placement import Computed, Placed, Run, contiguous_runs, materialise
from tierstore.stores.safetensors import SafetensorsStore
from tierstore.tensors import Piece

READY_NBYTES = 16 << 20
"""Arithmetic of up to this many bytes in all is done in memory when a checkpoint is opened."""


@dataclass(frozen=True)
class Checkpoint:
    """A module on meta, and where each of its weights is.

    ``pieces``, by name of parameter or persistent buffer (``named_parameters()``, so a tied weight has one
    name), cover the contiguous tensor exactly once; ``ready`` holds the values of all other parameters and
    buffers, on the CPU. ``notes`` say what was converted, computed or left out, and why.
    """

    module: torch.nn.Module
    pieces: Mapping[str, tuple[Piece, ...]]
    store: Store
    ready: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


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
    names if that generates no text. Where weights need arithmetic (a cast, a transposition) beyond 16 MiB in
    all, they are converted once into a file below ``store_dir``, of at most ``nvme`` bytes, and found there the
    next time. Nothing is fetched from the network and no pickle is loaded.

    Raises ``CheckpointError`` for a checkpoint that does not fit its model, and ``StoreError`` for one that
    cannot be read. The caller closes ``store``.
    """
    path = Path(path)
    config = read_config(path, model_class, trust_remote_code)
    store = SafetensorsStore(path / (getattr(config, "transformers_weights", None) or ""))
    try:
        traced = trace(path, config, store, dtype=dtype, model_class=model_class, trust_remote_code=trust_remote_code)
        runs = {name: contiguous_runs(placed) for name, placed in traced.placed.items()}
        arithmetic = {name: placed for name, placed in traced.placed.items() if _computed_in(runs[name])}
        ready, notes = dict(traced.ready), list(traced.notes)
        if sum(placed.nbytes for placed in arithmetic.values()) <= READY_NBYTES:
            ready |= {name: materialise(placed) for name, placed in arithmetic.items()}
            runs = {name: made for name, made in runs.items() if name not in arithmetic}
            notes += [f"in memory: {line}" for line in _reasons(arithmetic)]
            return Checkpoint(traced.module, _pieces(runs, {}, 0), store, ready, tuple(notes))
        tensors = {
            (name if number == 0 else f"{name}#{number}"): source
            for name in arithmetic
            for number, source in enumerate(_computed_in(runs[name]))
        }
        if store_dir is None:
            raise CheckpointError(_refusal(path, arithmetic, tensors))
        file, fingerprint = _place_for(path, store_dir, store, tensors)
        made = converted_store(file, tensors, fingerprint, nvme=nvme)
        where = {source: made.pieces(name)[0] for name, source in tensors.items()}
        notes += [f"in {str(file)!r}: {line}" for line in _reasons(arithmetic)]
        joined = JoinedStore(store, len(store.paths), made)
        return Checkpoint(traced.module, _pieces(runs, where, len(store.paths)), joined, ready, tuple(notes))
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


def _reasons(arithmetic: Mapping[str, Placed]) -> list[str]:
    """Lines such as ``"12 tensors (1.20 GiB): cast from float32 to bfloat16"``."""
    count: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for placed in arithmetic.values():
        why = " and ".join(sorted({_reason(source) for source in _computed_in(contiguous_runs(placed))}))
        count[why] += 1
        nbytes[why] += placed.nbytes
    return [f"{count[why]} tensors ({format_nbytes(nbytes[why])}): {why}" for why in count]


def _reason(source: Computed) -> str:
    inner = [part for part in torch.utils._pytree.tree_leaves(source.args) if isinstance(part, Placed)]
    name = source.func.__name__ if hasattr(source.func, "__name__") else str(source.func)
    if name.startswith("_to_copy"):
        return f"cast from {str(inner[0].dtype)[6:]} to {str(source.dtype)[6:]}"
    deeper = {_reason(found) for part in inner for found in _computed_in(part.runs)}
    if name.startswith(("clone", "cat", "stack")):
        return " and ".join(sorted(deeper)) or "rearranged in runs below 4 KiB"
    return " and ".join(sorted(deeper | {name.split(".")[0]}))


def _refusal(path: Path, arithmetic: Mapping[str, Placed], tensors: Mapping[str, Computed]) -> str:
    names = list(arithmetic)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    need = sum(tensor.nbytes for tensor in tensors.values())
    return (
        f"{len(names)} weights of {str(path)!r} need arithmetic before they can be used ({shown}: "
        f"{'; '.join(_reasons(arithmetic))}), which takes {format_nbytes(need)} on disk once: pass store= with a "
        "folder for them, or a dtype= that needs no cast"
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
