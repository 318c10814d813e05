"""What truly needs arithmetic, done once and kept: one safetensors file per checkpoint, written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from tierstore.budget import format_nbytes
from tierstore.errors import StoreBusyError, StoreError, StoreFullError
from tierstore.hf.placement import Computed, materialise
from tierstore.stores.safetensors import DTYPES, SafetensorsStore

_PAGE = 4096
_CODES = {name: code for code, name in DTYPES.items()}


def converted_store(
    file: Path, tensors: Mapping[str, Computed], fingerprint: str, *, nvme: int | None = None
) -> SafetensorsStore:
    """A store of ``tensors`` at ``file``: the one that is there if it has this ``fingerprint``, else written anew.

    One tensor is in memory at a time, with what it is made of. ``nvme`` bounds the bytes written. Raises
    ``StoreFullError``, ``StoreBusyError`` while another process writes it, and what reading the sources raises.
    """
    if (found := _existing(file, fingerprint)) is not None:
        return found
    need = sum(tensor.nbytes for tensor in tensors.values())
    require_room(file.parent, need, nvme, what=f"{len(tensors)} converted tensors")
    with written_whole(file) as descriptor:
        _write(descriptor, tensors, fingerprint)
    return SafetensorsStore(file)


def require_room(folder: Path, need: int, nvme: int | None, *, what: str) -> None:
    """Raise ``StoreFullError`` if ``need`` bytes are beyond the ``nvme`` bound or what the filesystem has free."""
    if nvme is not None and need > nvme:
        raise StoreFullError(
            f"{what} need {format_nbytes(need)} below {str(folder)!r}, Budget.nvme is {format_nbytes(nvme)}: raise it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if need > (free := shutil.disk_usage(folder).free):
        raise StoreFullError(
            f"{what} need {format_nbytes(need)} below {str(folder)!r}, {format_nbytes(free)} are free: make room, or "
            "give a store= on another disk"
        )


@contextmanager
def written_whole(file: Path) -> Iterator[int]:
    """A descriptor to write to; ``file`` appears, durably, only when the block ends without an error.

    One process at a time: the others get ``StoreBusyError``. What a killed process left is overwritten.
    """
    part = file.with_name(file.name + ".part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"cannot write {str(part)!r}: {error.strerror}: give a store= that can be written") from error
    try:
        _lock(descriptor, part)
        os.ftruncate(descriptor, 0)
        yield descriptor
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        part.rename(file)
        sync_folder(file.parent)
    except StoreBusyError:
        raise
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError(
                f"no room to write {str(part)!r}: make room, or give a store= on another disk"
            ) from error
        raise
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, part: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = part.exists() and os.path.samestat(os.fstat(descriptor), part.stat())
    except OSError:
        same = False
    if not same:  # locked, or renamed by the process that held the lock a moment ago
        raise StoreBusyError(f"another process writes {str(part)!r} now: wait until it is done, then try again")


def _existing(file: Path, fingerprint: str) -> SafetensorsStore | None:
    if not file.exists():
        return None
    try:
        store = SafetensorsStore(file)
    except StoreError:  # damaged since: it can be made again
        return None
    if store.metadata.get("tierstore") == fingerprint:
        return store
    store.close()
    return None


def _write(descriptor: int, tensors: Mapping[str, Computed], fingerprint: str) -> None:
    table: dict[str, object] = {"__metadata__": {"tierstore": fingerprint}}
    at = 0
    for name, tensor in tensors.items():
        code = _CODES[str(tensor.dtype).removeprefix("torch.")]
        table[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(table).encode()
    header += b" " * (-(8 + len(header)) % _PAGE)  # the data starts on a page
    with open(descriptor, "wb", closefd=False) as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            out.write(memoryview(materialise(tensor).reshape(-1).view(torch.uint8).numpy()))
