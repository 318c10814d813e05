"""The assembly line of packing: the next tensor is read while one is packed and the one before is written."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.formats.format import Format, Parts, matrices_in, matrices_of
from tierstore.formats.named import format_named
from tierstore.formats.scratch import Scratch
from tierstore.formats.tiles import tiles
from tierstore.stores.manifest import Manifest, PackedEntry
from tierstore.stores.packed_writer import PackedWriter
from tierstore.tensors import KEEP

Packer = Callable[[str, Format, Tensor], Parts]
"""Packs a weight, which it is told the name of."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass
class Step:
    """What one step of the line did: ``nbytes`` read, packed (counted as they were before), or written."""

    nbytes: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second of the step's own time."""
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Progress:
    """How far packing is, in bytes as they were before, and the tensor that was written last."""

    done_nbytes: int
    total_nbytes: int
    tensor: str


def assemble(
    read: Callable[[str], Tensor],
    writer: PackedWriter,
    plan: Manifest,
    packer: Packer,
    device: torch.device,
    *,
    at_once: int,
    stop: Callable[[], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Step]:
    """Write the units that are left: ``read`` gives a tensor by name, ``packer`` its parts, on ``device``.

    One tensor is being read, ``at_once`` packed, begun in the order of the plan, and one written: as many are in
    memory. Gives what the steps "read", "pack" and "write" did. Raises what any of them raises; whole units stay.
    ``stop`` is called at the end, also an early one, before what is being packed is waited for.
    """
    steps = {"read": Step(), "pack": Step(), "write": Step()}
    left = writer.left
    todo = [entry for number in left for entry in plan.units[number].tensors]
    total = plan.source_nbytes
    done = total - sum(entry.source_nbytes for entry in todo)
    scratch = Scratch()

    def read_one(entry: PackedEntry) -> tuple[PackedEntry, Tensor]:
        return entry, read(entry.name)

    def pack_one(item: tuple[PackedEntry, Tensor]) -> tuple[Tensor | Parts, float | None]:
        entry, tensor = item
        return (tensor, None) if entry.format == KEEP else _packed(entry, tensor.to(device), packer, scratch)

    with (
        _workers("read", 1) as readers,
        _workers("pack", at_once) as presses,
        closing(_ahead(readers, read_one, todo, steps["read"])) as tensors,
        closing(_ahead(presses, pack_one, tensors, steps["pack"])) as packed,
        ExitStack() as ending,
    ):
        if stop is not None:
            ending.callback(stop)
        for number in left:
            start, waited = time.perf_counter(), 0.0
            with writer.unit(number) as unit:
                for entry in plan.units[number].tensors:
                    asked = time.perf_counter()
                    data, wrong = next(packed)
                    waited += time.perf_counter() - asked
                    unit.add(entry.name, data, relative_error=wrong)
                    del data
                    steps["read"].nbytes += entry.source_nbytes
                    steps["pack"].nbytes += entry.source_nbytes if entry.format != KEEP else 0
                    done += entry.source_nbytes
                    if progress is not None:
                        progress(Progress(done, total, entry.name))
            steps["write"].seconds += time.perf_counter() - start - waited
            steps["write"].nbytes += plan.units[number].nbytes
    return steps


def relative_error(form: Format, parts: Parts, tensor: Tensor, scratch: Scratch) -> float:
    """``||w' - w|| / ||w||`` over all values of ``tensor``, where w' is what ``parts`` unpack to; 0 where both are 0.

    ``parts`` are on the tensor's device. A tile is unpacked at a time, in memory of ``scratch``.
    """
    front, n, k = matrices_of(tensor.shape)
    wrong, whole = 0.0, 0.0
    for matrix, own in zip(tensor.reshape(-1, n, k), matrices_in(parts, front), strict=True):
        for first, values in tiles(form, own, n, k, torch.float32, scratch):
            rows = matrix[first : first + len(values)].float()
            whole += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
            wrong += float(torch.linalg.vector_norm(rows - values, dtype=torch.float64)) ** 2
    return sqrt(wrong / whole) if whole else 0.0


def _packed(entry: PackedEntry, tensor: Tensor, packer: Packer, scratch: Scratch) -> tuple[Parts, float]:
    form = format_named(entry.format)
    with torch.no_grad():
        try:
            parts = packer(entry.name, form, tensor)
        except ModuleError as error:
            raise ModuleError(f"{entry.name} cannot be packed as {form.name}: {error}") from error
        return parts, relative_error(form, parts, tensor, scratch)


class _Workers(NamedTuple):
    pool: ThreadPoolExecutor
    number: int


@contextmanager
def _workers(what: str, number: int) -> Iterator[_Workers]:
    """Threads whose operations share the processors that torch uses.

    Packing is many small operations: side by side, several tensors take half the time of several processors that join
    in each operation.
    """
    threads = torch.get_num_threads()
    share = partial(torch.set_num_threads, max(threads // number, 1))
    try:
        with ThreadPoolExecutor(number, f"tierstore-{what}", share) as pool:
            yield _Workers(pool, number)
    finally:
        torch.set_num_threads(threads)  # for threads that are still to come: a thread's own number is its own


def _ahead(
    workers: _Workers, function: Callable[[_Item], _Result], items: Iterable[_Item], step: Step
) -> Generator[_Result, None, None]:
    """``function`` of each item, in order; while one result is used, workers make more. ``step`` gets the time."""

    def timed(item: _Item) -> tuple[_Result, float]:
        start = time.perf_counter()
        made = function(item)
        return made, time.perf_counter() - start

    def first() -> _Result:
        made, seconds = waiting.popleft().result()
        step.seconds += seconds / workers.number
        return made

    waiting: deque[Future[tuple[_Result, float]]] = deque()
    try:
        for item in items:
            waiting.append(workers.pool.submit(timed, item))
            del item
            if len(waiting) > workers.number:
                yield first()
        while waiting:
            yield first()
    finally:
        for future in waiting:
            future.cancel()
