"""What of a module in memory is written to disk for as long as a session lasts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tierstore.binding.inventory import Entry, Span
from tierstore.contracts import ReadRequest
from tierstore.stores.zarr import SpillStore
from tierstore.tensors import TensorSpec


def write_spill(
    root: Path,
    entries: Sequence[Entry],
    blocks: Iterable[Span],
    others: Iterable[tuple[TensorSpec, Callable[[], Tensor]]],
    *,
    limit_nbytes: int | None,
) -> SpillStore:
    """Below ``root``: the bytes of ``blocks`` under their names, and ``others``, each with what makes its bytes.

    One at a time stands in host memory. ``entries`` are all the module's: by them leftovers of it are known.
    """
    tensors = [(TensorSpec(span.name, "uint8", (span.nbytes,)), partial(host_bytes, span)) for span in blocks]
    return SpillStore.create(root, [*tensors, *others], fingerprint=_fingerprint(entries), limit_nbytes=limit_nbytes)


def read_whole(spill: SpillStore, name: str) -> Tensor:
    """The bytes of a tensor in the store: 1-D uint8, in host memory."""
    memory = torch.empty(spill.specs[name].nbytes, dtype=torch.uint8)
    (piece,) = spill.pieces(name)
    spill.read([ReadRequest(piece.file, piece.extent, memory)]).wait()
    return memory


def host_bytes(span: Span) -> Tensor:
    """The bytes of a block: 1-D uint8, in host memory."""
    return span.read().cpu()


def _fingerprint(entries: Sequence[Entry]) -> str:
    """Which model this is: names, dtypes and shapes."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.name} {entry.tensor.dtype} {tuple(entry.tensor.shape)}\n".encode())
    return digest.hexdigest()
