"""What truly needs arithmetic, done once and kept in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from tierstore.errors import StoreError
from tierstore.hf.durable import only_writer, require_room, written_whole
from tierstore.hf.placement import Computed, materialise
from tierstore.stores.safetensors import DTYPES, SafetensorsStore

_PAGE = 4096
_CODES = {name: code for code, name in DTYPES.items()}
_KEY = "tierstore"


def converted_store(
    file: Path, tensors: Mapping[str, Computed], fingerprint: str, *, nvme: int | None = None
) -> tuple[SafetensorsStore, int]:
    """A store of ``tensors`` at ``file``: the one that is there if it has this ``fingerprint``, else written anew.
    And the bytes written.

    One tensor is in memory at a time, with what it is made of. ``nvme`` bounds the bytes written. Raises
    ``StoreFullError``, ``StoreBusyError`` while another process writes there, and what reading the sources raises.
    """
    if (found := _existing(file, fingerprint)) is not None:
        return found, 0
    with only_writer(file.parent):
        need = sum(tensor.nbytes for tensor in tensors.values())
        require_room(file.parent, need, nvme, what=f"{len(tensors)} converted tensors")
        with written_whole(file) as part:
            _write(part, tensors, fingerprint)
    return SafetensorsStore(file), file.stat().st_size


def _existing(file: Path, fingerprint: str) -> SafetensorsStore | None:
    if not file.exists():
        return None
    try:
        store = SafetensorsStore(file)
    except StoreError:  # damaged since: it can be made again
        return None
    if store.metadata.get(_KEY) == fingerprint:
        return store
    store.close()
    return None


def _write(part: Path, tensors: Mapping[str, Computed], fingerprint: str) -> None:
    table: dict[str, object] = {"__metadata__": {_KEY: fingerprint}}
    at = 0
    for name, tensor in tensors.items():
        code = _CODES[str(tensor.dtype).removeprefix("torch.")]
        table[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(table).encode()
    header += b" " * (-(8 + len(header)) % _PAGE)  # the data starts on a page
    with part.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            out.write(materialise(tensor).reshape(-1).view(torch.uint8).numpy().data)
