"""The names of the files that a job writes, checked before any work."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tierstore.errors import StoreError


@dataclass(frozen=True, slots=True)
class JobPaths:
    """``results``, ``errors`` for rows without an answer, and ``state`` of the job; links followed."""

    results: Path
    errors: Path
    state: Path

    @property
    def written(self) -> tuple[Path, ...]:
        """All that a job writes: also where another state is before it takes the place of ``state``."""
        return self.results, self.errors, self.state, next_of(self.state)

    @classmethod
    def checked(
        cls,
        prompts: str | os.PathLike[str],
        results: str | os.PathLike[str],
        errors: str | os.PathLike[str] | None = None,
    ) -> JobPaths:
        """Files to write for the results of ``prompts``; ``errors`` is ``RESULTS.errors`` unless named.

        Makes nothing. Raises ``StoreError`` where one could not be written, or would be another of them."""
        target = _real(results)
        paths = cls(
            target,
            _real(errors) if errors is not None else target.with_name(target.name + ".errors"),
            target.with_name(target.name + ".job"),
        )
        taken = {"prompts": _real(prompts)}
        for what, path in zip(("results", "errors", "state", "the next state"), paths.written, strict=True):
            _check_writable(path, what)
            for other, there in taken.items():
                if path == there or (path.exists() and there.exists() and path.samefile(there)):
                    raise StoreError(f"{str(path)!r} would be the file of {other} and of {what}: give them two names")
            taken[what] = path
        return paths


def next_of(state: Path) -> Path:
    """Where another state is written before it takes the place of ``state``."""
    return state.with_name(state.name + ".new")


def _real(path: str | os.PathLike[str]) -> Path:
    if os.fspath(path) == "-":
        raise StoreError(
            "a job goes on after an interruption by reading its files again, standard input and output cannot be: give "
            "a file"
        )
    if os.fspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        raise StoreError(f"{os.fspath(path)!r} is an open file of this process: give the name of a file")
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a ring of links, a byte 0
        raise StoreError(f"{os.fspath(path)!r} is no name for a file: {error}") from error


def _check_writable(path: Path, what: str) -> None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise StoreError(
                f"the folder {str(path.parent)!r} for the file of {what} does not exist: make it, or give another file"
            ) from None
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise StoreError(
                f"no right to make the file of {what} in {str(path.parent)!r}: give another folder"
            ) from None
        return
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be the file of {what}: {error.strerror}: give another") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device or pipe"
        raise StoreError(f"{str(path)!r} is {kind}, the {what} of a job are a regular file: give the name of one")
    if not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"no right to read and write {str(path)!r}, the file of {what}: change that, or give another")
