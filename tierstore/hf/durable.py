"""Files and folders that are there whole or not at all, written by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tierstore.budget import format_nbytes
from tierstore.errors import StoreBusyError, StoreError, StoreFullError


def require_room(folder: Path, need: int, nvme: int | None, *, what: str) -> None:
    """Raise ``StoreFullError`` if ``need`` bytes are beyond the ``nvme`` bound or what is free in ``folder``."""
    if nvme is not None and need > nvme:
        raise StoreFullError(
            f"{what} need {format_nbytes(need)} below {str(folder)!r}, Budget.nvme is {format_nbytes(nvme)}: raise it"
        )
    if need > (free := shutil.disk_usage(folder).free):
        raise StoreFullError(
            f"{what} need {format_nbytes(need)} below {str(folder)!r}, {format_nbytes(free)} are free: make room, or "
            "give a store= on another disk"
        )


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the one process that writes in ``folder``, which is made. Raises ``StoreBusyError`` while another is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(
            f"cannot write to {str(folder)!r}: {error.strerror}: pass store= with a folder that can be written"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreBusyError(
                f"another process writes in {str(folder)!r} now: wait until it is done, then try again"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path to make a file or a folder at. It takes the name ``target``, durably, when the block ends without error.

    For the only writer: what a killed process left at the path is removed first. A full disk is ``StoreFullError``.
    """
    part = target.with_name(target.name + ".part")
    try:
        _remove(part)
        yield part
        for made in [*part.iterdir(), part] if part.is_dir() else [part]:
            _sync(made)
        if part.is_dir():
            _remove(target)
        part.replace(target)
        _sync(target.parent)
    except BaseException as error:
        _remove(part)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):  # safetensors' own error has no errno
            raise StoreFullError(f"no room for {str(target)!r}: make room, or give a store= on another disk") from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # the page cache is for others
    finally:
        os.close(descriptor)
