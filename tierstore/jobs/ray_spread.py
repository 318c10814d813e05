"""How a job is divided among the workers of a Ray cluster: what each of them gets, and how rows flow to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tierstore.errors import DeviceError

CHUNKS = 32
"""Chunks of rows that a worker has at once. When one is done the next one comes, so a worker always has rows."""
ROWS = 64
"""The most rows of a chunk, unless more texts are to be generated at once than so many chunks have rows."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Chunks of up to ``rows`` rows go to ``workers`` workers, each of which has up to ``chunks`` of them at once."""

    workers: int
    chunks: int
    rows: int


@dataclass(frozen=True, slots=True)
class Spread:
    """``workers`` processes with ``cpus`` CPUs and ``gpus`` GPUs each, which compute on ``device``."""

    workers: int
    cpus: int
    gpus: int
    device: Literal["cpu", "cuda"]

    def flow(self, rows: int, sequences: int | None) -> Flow:
        """For ``rows`` rows, at least 1, of which up to ``sequences`` are under way at once in a worker, None for any
        number: every worker gets its share of few rows, and more than it can have under way of many."""
        share = -(-rows // self.workers)
        most = max(ROWS, -(-2 * (sequences or 0) // CHUNKS))
        each = min(most, -(-share // CHUNKS))
        chunks = -(-rows // each)
        return Flow(min(self.workers, chunks), min(CHUNKS, -(-share // each)), each)

    def __str__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        share = "1 GPU" if self.gpus else "1 CPU" if self.cpus == 1 else f"{self.cpus} CPUs"
        return f"{workers} on Ray, each with {share}"


def spread(nodes: Sequence[Mapping[str, float]], device: str | None, workers: int | None) -> Spread:
    """``workers`` on the machines ``nodes``, of which Ray counts "CPU" and "GPU".

    ``workers`` None: one on each GPU; without GPUs, or for the ``device`` "cpu", one on each machine. On CPUs they get
    the largest share that is the same for all. Raises ``DeviceError`` where so many do not fit."""
    if device not in (None, "cpu", "cuda"):
        raise DeviceError(
            f"device is {device!r}, and Ray gives each worker a GPU of its own: give cuda or cpu, or none"
        )
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device == "cuda" or (device is None and gpus):
        if not gpus:
            raise DeviceError("device is 'cuda', and the Ray cluster has no GPU: leave it out, or give cpu")
        if workers is not None and workers > gpus:
            raise DeviceError(f"{workers} workers need a GPU each, and the Ray cluster has {gpus}: lower workers")
        return Spread(gpus if workers is None else workers, 0, 1, "cuda")
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    count = max(1, len(cpus)) if workers is None else workers
    for each in range(max(cpus, default=0), 0, -1):
        if sum(have // each for have in cpus) >= count:
            return Spread(count, each, 0, "cpu")
    raise DeviceError(f"{count} workers need a CPU each, and the Ray cluster has {sum(cpus)}: lower workers")
