"""How fast a disk gives the bytes of some files, past the page cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tierstore.contracts import Fence, ReadRequest
from tierstore.extents import Extent
from tierstore.pools.host import HostPool
from tierstore.stores.reader import Reader
from tierstore.stores.workers import PAGE

SECONDS = 2.0
"""How long fio reads for one figure."""
PIECE, PIECES = 4 << 20, 8
"""Bytes of a read of ``Laps``, and how many are under way."""
SWEEP_SECONDS = 0.8
"""How long it tries a setting."""


@dataclass(frozen=True)
class Setting:
    """How fio reads: one process with ``depth`` reads in flight, or ``jobs`` with one each."""

    engine: str
    block: str
    depth: int = 1
    jobs: int = 1

    def __str__(self) -> str:
        many = f"iodepth {self.depth}" if self.jobs == 1 else f"{self.jobs} jobs"
        return f"{self.engine} bs={self.block} {many}"


SETTINGS = (
    Setting("libaio", "1m", depth=16),
    Setting("libaio", "2m", depth=4),
    Setting("libaio", "2m", depth=8),
    Setting("libaio", "4m", depth=4),
    Setting("libaio", "4m", depth=8),
    Setting("libaio", "8m", depth=4),
    Setting("psync", "2m", jobs=4),
    Setting("psync", "4m", jobs=4),
)


class FioError(RuntimeError):
    """fio ran and failed."""


def has_fio() -> bool:
    """Whether fio is installed."""
    return shutil.which("fio") is not None


def best_setting(files: Sequence[Path]) -> tuple[Setting, dict[Setting, float]]:
    """The setting with the best mean of two rounds, and each one's bytes per second."""
    rounds = [[fio_rate(files, setting, SWEEP_SECONDS) for setting in SETTINGS] for _ in range(2)]
    means = {setting: (one + other) / 2 for setting, one, other in zip(SETTINGS, *rounds, strict=True)}
    return max(means, key=means.__getitem__), means


def reader_rate(files: Sequence[Path], rounds: int) -> float:
    """Where fio is missing: bytes per second of tierstore's own reader, the best of ``rounds`` of 256 MiB or a file."""
    reader = Reader(files)
    try:
        memory = torch.empty(min(256 << 20, *reader.sizes), dtype=torch.uint8)
        rates = []
        for turn in range(rounds):
            lap, file = divmod(turn, len(files))
            parts = max(reader.sizes[file] // memory.numel(), 1)
            request = ReadRequest(file, Extent(lap % parts * memory.numel(), memory.numel()), memory)
            start = time.perf_counter()
            reader.read([request]).wait()
            rates.append(memory.numel() / (time.perf_counter() - start))
    finally:
        reader.close()
    return max(rates)


class Laps:
    """Reads the first ``nbytes`` of a file again and again by tierstore's reader: pieces of 4 MiB, eight of them under
    way. For comparisons on a disk whose rate changes, in turns with what is compared."""

    def __init__(self, file: Path, nbytes: int) -> None:
        self._reader = Reader([file])
        self._nbytes = nbytes
        self._pool = HostPool(PIECES * PIECE, huge_pages=True)  # as rings have
        lease = self._pool.lease(PIECES * PIECE, align=PAGE)
        assert lease is not None
        self._memory = lease.buffer
        self.seconds: list[float] = []
        """Of each lap."""

    def run(self) -> None:
        """One lap."""
        start, under_way = time.perf_counter(), list[Fence]()
        for number, at in enumerate(range(0, self._nbytes, PIECE)):
            if len(under_way) == PIECES:
                under_way.pop(0).wait()
            size = min(PIECE, self._nbytes - at)
            place = number % PIECES * PIECE
            request = ReadRequest(0, Extent(at, size), self._memory[place : place + size])
            under_way.append(self._reader.read([request]))
        for fence in under_way:
            fence.wait()
        self.seconds.append(time.perf_counter() - start)

    def close(self) -> None:
        """End the reader, and give the memory back."""
        self._reader.close()
        self._pool.close()


def fio_rate(files: Sequence[Path], setting: Setting, seconds: float = SECONDS) -> float:
    """Bytes per second that fio reads with ``setting``."""
    command = [
        "fio",
        "--output-format=json",
        "--readonly",
        "--rw=read",
        "--direct=1",
        "--time_based",
        f"--runtime={round(1000 * seconds)}ms",
        "--group_reporting",
        f"--ioengine={setting.engine}",
        f"--bs={setting.block}",
        f"--iodepth={setting.depth}",
        *_jobs(files, setting.jobs),
    ]
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # huge pages: larger requests to the disk
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    return float(sum(job["read"]["bw_bytes"] for job in _jobs_of(done)))


def fio_write_rate(folder: Path, seconds: float = SECONDS) -> float:
    """Bytes per second that fio writes to a new file in ``folder``, past the page cache."""
    command = [
        "fio",
        "--output-format=json",
        "--rw=write",
        "--direct=1",
        "--time_based",
        f"--runtime={round(1000 * seconds)}ms",
        "--size=1g",
        "--ioengine=libaio",
        "--bs=4m",
        "--iodepth=4",
        "--name=job",
        f"--filename={folder / 'written-by-fio'}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        (folder / "written-by-fio").unlink(missing_ok=True)
    return float(_jobs_of(done)[0]["write"]["bw_bytes"])


def _jobs_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    if done.returncode:
        raise FioError(f"fio ended with status {done.returncode}: {(done.stderr or done.stdout)[-1000:]}")
    jobs: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return jobs


def _jobs(files: Sequence[Path], count: int) -> Iterator[str]:
    """Each job begins elsewhere, so that no two read the same blocks at about the same time."""
    for job in range(count):
        turned = [*files[job % len(files) :], *files[: job % len(files)]]
        yield f"--name=job{job}"
        yield "--filename=" + ":".join(str(file).replace(":", r"\:") for file in turned)
        yield f"--offset={90 * job // count}%"
