"""The little of psutil that tierstore and its tests use, from /proc, for machines where nothing can be installed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Bytes of the machine."""

    total: int
    available: int


@dataclass(frozen=True)
class Partition:
    """One mount."""

    mountpoint: str
    fstype: str


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of a process."""

    rss: int
    vms: int


def virtual_memory() -> Memory:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    fields = {name.rstrip(":"): int(value) << 10 for name, value, *_ in lines}
    return Memory(fields["MemTotal"], fields["MemAvailable"])


def disk_partitions(*, all: bool = False) -> list[Partition]:
    found = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        found.append(Partition(where.encode().decode("unicode_escape"), kind))
    return found


class Process:
    """This process."""

    def memory_info(self) -> ProcessMemory:
        pages = Path("/proc/self/statm").read_text().split()
        size = os.sysconf("SC_PAGE_SIZE")
        return ProcessMemory(rss=int(pages[1]) * size, vms=int(pages[0]) * size)

    def create_time(self) -> float:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return int(boot.split()[1]) + started / os.sysconf("SC_CLK_TCK")
