"""What a checkpoint holds for a model, before anybody decides how its weights are to be brought."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.errors import CheckpointError
from tierstore.hf.gguf import import_gguf
from tierstore.hf.model import read_config, trace
from tierstore.hf.placement import Placed, materialise
from tierstore.stores.packed import is_packed
from tierstore.stores.safetensors import SafetensorsStore


@dataclass(frozen=True)
class Source:
    """A module on meta, and where its weights come from: ``placed`` in files, ``ready`` in memory.

    Names are those of ``named_parameters()`` and ``named_buffers()``, so a tied weight has one. ``notes`` say
    what was left out, and why. ``path`` is the folder with config and tokenizer; ``written_nbytes`` is what
    opening wrote to disk.
    """

    module: torch.nn.Module
    placed: Mapping[str, Placed]
    ready: Mapping[str, torch.Tensor]
    store: SafetensorsStore
    notes: tuple[str, ...]
    path: Path
    written_nbytes: int = 0

    def read(self, name: str) -> torch.Tensor:
        """The values of a parameter or buffer, contiguous, on the CPU: read, and computed where the files hold it
        otherwise. Nothing is kept. Raises ``StoreReadError``."""
        return materialise(self.placed[name]) if name in self.placed else self.ready[name]


def open_source(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    model_class: type | None = None,
    trust_remote_code: bool = False,
    store_dir: Path | None = None,
    nvme: int | None = None,
) -> Source:
    """Open the checkpoint in folder ``path``, or a ``.gguf`` file, which is imported first, without reading weights.

    Arguments and errors are those of ``open_checkpoint``. The caller closes ``store``.
    """
    path = Path(path)
    if is_packed(path):
        raise CheckpointError(
            f"{str(path)!r} is packed already, weights as they were trained are needed: give the checkpoint it was "
            "packed from, or take the packed store as it is with tierstore.load"
        )
    notes: list[str] = []
    written = 0
    if path.suffix.lower() == ".gguf":
        path, written, note = import_gguf(path, dtype=dtype, model_class=model_class, store_dir=store_dir, nvme=nvme)
        dtype, notes = None, [note]
    config = read_config(path, model_class, trust_remote_code)
    store = SafetensorsStore(_weights_of(path, config))
    try:
        traced = trace(path, config, store, dtype=dtype, model_class=model_class, trust_remote_code=trust_remote_code)
    except BaseException:
        store.close()
        raise
    return Source(traced.module, traced.placed, traced.ready, store, (*notes, *traced.notes), path, written)


def _weights_of(path: Path, config: object) -> Path:
    named = getattr(config, "transformers_weights", None)
    if named and Path(named).name != named:
        raise CheckpointError(
            f"config.json of {str(path)!r} sends its weights to {named!r}, a file name beside it is needed: do not "
            "trust this checkpoint"
        )
    return path / named if named else path
