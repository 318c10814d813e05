"""A cgroup that bounds the memory of processes, page cache included."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

CGROUPS = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class CapError(RuntimeError):
    """This process cannot cap memory, and why."""


@dataclass(frozen=True)
class Hierarchy:
    """Where memory cgroups are made, and what their files are called."""

    root: Path
    limit: str
    peak: str
    no_swap: tuple[str, str]

    @classmethod
    def found(cls, cgroups: Path = CGROUPS) -> Hierarchy:
        """Version 2 where its memory controller is, else version 1. Raises ``CapError`` where neither is."""
        controllers = cgroups / "cgroup.controllers"
        if controllers.exists() and "memory" in controllers.read_text().split():
            return cls(cgroups, "memory.max", "memory.peak", ("memory.swap.max", "0"))
        version1 = cgroups / "memory"
        if (version1 / "memory.limit_in_bytes").exists():
            peak = "memory.max_usage_in_bytes"
            return cls(version1, "memory.limit_in_bytes", peak, ("memory.swappiness", "0"))
        raise CapError(f"no memory cgroup controller is mounted at {cgroups}: mount one, or pass --no-cap")


class MemoryCap:
    """A context manager that makes a cgroup of ``limit_nbytes``; leaving it kills what still runs there."""

    def __init__(self, limit_nbytes: int, hierarchy: Hierarchy) -> None:
        self._limit_nbytes = limit_nbytes
        self._hierarchy = hierarchy
        self._folder = hierarchy.root / f"tierstore-bench-{os.getpid()}"

    @property
    def processes(self) -> Path:
        """The file that a process joins by writing its id into it."""
        return self._folder / "cgroup.procs"

    def peak_nbytes(self) -> int | None:
        """The most memory in use at once, page cache included; None where the kernel does not say."""
        with suppress(OSError):
            return int((self._folder / self._hierarchy.peak).read_text())
        return None

    def __enter__(self) -> Self:
        hierarchy = self._hierarchy
        try:
            if hierarchy.limit == "memory.max":  # a child has a controller only where its parent hands it down
                (hierarchy.root / "cgroup.subtree_control").write_text("+memory")
            self._folder.mkdir()
            with suppress(FileNotFoundError):
                (self._folder / hierarchy.no_swap[0]).write_text(hierarchy.no_swap[1])
            (self._folder / hierarchy.limit).write_text(str(self._limit_nbytes))
        except OSError as error:
            with suppress(OSError):
                self._folder.rmdir()
            raise CapError(
                f"cannot make a memory cgroup below {hierarchy.root}: {error.strerror}: run as root, or pass --no-cap"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop = time.monotonic() + 10
        while time.monotonic() < stop:  # a killed process leaves a moment later
            for pid in self.processes.read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self._folder.rmdir()
                return
            except OSError:
                time.sleep(0.05)
        raise CapError(f"{self._folder} could not be removed: rmdir it when its processes have ended")


def drop_caches() -> None:
    """Empty the page cache, so that what follows reads from the disk. Raises ``CapError`` without the right to."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError as error:
        raise CapError(f"cannot drop caches: {error.strerror}: run as root, or pass --no-cap") from error
