"""The state file of a job: what its results depend on, and which process works at it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tierstore.errors import StoreFormatError, StoreMismatchError
from tierstore.jobs.line_file import file_errors, hold, sync_folder
from tierstore.jobs.lines import read_object
from tierstore.jobs.paths import next_of

VERSION = 1
_MAX_NBYTES = 1 << 20


class JobState:
    """The right of this process to the job whose state file is ``path``.

    ``facts`` is what its results depend on: nested tables of what JSON can say. The file is made for a new job. Where
    one is, its facts have to be the same: ``StoreMismatchError`` names those that differ and says ``anew``, how to
    start anew. ``StoreBusyError`` while another process works at the job, ``StoreFormatError`` for what is no state."""

    def __init__(self, path: Path, facts: Mapping[str, Any], *, anew: str) -> None:
        self.path = path
        self._anew = anew
        self._fd = -1
        wanted: dict[str, Any] = json.loads(json.dumps(facts, allow_nan=False))
        with file_errors(f"opening the state of the job, {str(path)!r}"):
            try:
                found = self._acquire()
                self.is_new = found is None
                """Whether the job begins."""
                if found is not None and (changes := differences(found["facts"], wanted)):
                    raise StoreMismatchError(
                        f"{str(path)!r} is of another job: {'; '.join(changes[:8])}: run it as it was begun to go on, "
                        f"or {anew}"
                    )
                self.created: int = int(time.time()) if found is None else found["created"]
                """When the job began, in seconds since 1970."""
                self._replace({"version": VERSION, "created": self.created, "process": os.getpid(), "facts": wanted})
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Let other processes have the job. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _acquire(self) -> dict[str, Any] | None:
        """Lock the file, and read it."""
        while True:
            self.release()
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            raw = os.pread(self._fd, _MAX_NBYTES + 1, 0)
            hold(self._fd, self.path, holder=f"process {_process(raw)}")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                    raw = os.pread(self._fd, _MAX_NBYTES + 1, 0)
                    return self._parsed(raw) if raw else None  # empty: killed before the job began

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        try:
            if len(raw) > _MAX_NBYTES:
                raise ValueError(f"it is longer than {_MAX_NBYTES} bytes")
            found = read_object(raw)
            version, created, facts = found.get("version"), found.get("created"), found.get("facts")
            if version != VERSION:
                raise ValueError(f"its version is {str(version)[:20]}, {VERSION} is known here")
            if type(created) is not int or not isinstance(facts, dict):
                raise ValueError("it lacks a time or facts")
        except ValueError as error:
            raise StoreFormatError(
                f"{str(self.path)!r} is no state of a job that can be read: {error}: {self._anew}"
            ) from None
        return found

    def _replace(self, content: dict[str, Any]) -> None:
        """Put another file in the place of the locked one: whole, durable, and locked before it has the name."""
        new = next_of(self.path)
        with suppress(FileNotFoundError):
            new.unlink()  # of a process that was killed: nobody else may be here
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            hold(fd, self.path)
            data = memoryview(json.dumps(content, indent=1).encode())
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
            os.replace(new, self.path)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                new.unlink()
            raise
        os.close(self._fd)
        self._fd = fd
        sync_folder(self.path)


def differences(have: Any, want: Any, name: str = "") -> list[str]:
    """What tells two values apart, in words."""
    if isinstance(have, dict) and isinstance(want, dict):
        keys = sorted({*have, *want})
        return [line for key in keys for line in differences(have.get(key), want.get(key), f"{name}.{key}".lstrip("."))]
    return [] if have == want and type(have) is type(want) else [f"{name} was {_short(have)}, now {_short(want)}"]


def _short(value: object) -> str:
    return text if len(text := json.dumps(value)) <= 80 else f"{text[:80]}..."


def _process(raw: bytes) -> str:
    with suppress(ValueError):
        return str(read_object(raw).get("process", "unknown"))[:20]
    return "unknown"
