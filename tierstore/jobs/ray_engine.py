"""A job on Ray: rows go to workers, each with a model of its own, and what they finish comes back to this process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from tierstore.errors import DeviceError
from tierstore.jobs.engine import Counts
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.ray_errors import error_of
from tierstore.jobs.ray_messages import Message
from tierstore.jobs.ray_spread import Spread, spread
from tierstore.jobs.rows import BadRow, Row
from tierstore.jobs.samples import Failed, Finished
from tierstore.jobs.settings import JobSettings
from tierstore.jobs.workload import Workload

try:
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy
    from ray.data.exceptions import ExecutionTimeoutError
except ImportError as missing:
    raise DeviceError(f"--engine ray needs {missing.name}: pip install 'tierstore[ray]'") from None

from tierstore.jobs.ray_source import Prompts, Wanted
from tierstore.jobs.ray_worker import Worker, choose

MOST_LOST = 4
"""So often each worker may be lost and replaced before all of them are started anew."""
SILENT_SECONDS = 600
"""All workers are started anew when none of them, nor the file of prompts, gave a sign for so long."""
MOST_BAD = 1000
"""Rows that cannot be answered, written at once."""

Skip = Callable[[int], bool]
Missing = Callable[[Row], Sequence[int]]


class RayJob:
    """A job whose rows are answered by the workers of ``spread``, with micro-batches of ``tokens`` tokens.

    ``notes`` say what was decided. ``counts`` and ``moved_nbytes`` are those of all workers together, as far as they
    told."""

    def __init__(
        self, settings: JobSettings, workload: Workload, spread: Spread, tokens: int, notes: Sequence[str]
    ) -> None:
        self.tokens = tokens
        self.notes = (str(spread), *notes)
        self._settings, self._spread = settings, spread
        self._workload = replace(workload, sequences=-(-workload.sequences // spread.workers))
        self._told: dict[str, Message] = {}

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        names = [field.name for field in fields(Counts)]
        return Counts(**{name: sum(getattr(told.counts, name) for told in self._told.values()) for name in names})

    @property
    def moved_nbytes(self) -> int:
        """Bytes of weights moved so far."""
        return sum(told.moved_nbytes for told in self._told.values())

    def report(self) -> None:
        """None: each worker has a session of its own."""

    def answer(self, prompts: PromptFile, skip: Skip, missing: Missing) -> Iterator[list[Finished | Failed]]:
        """Texts that are finished, and rows that failed, in any order, without their prompts; now and then none.

        ``skip`` and ``missing`` say what is done: whatever was given out before has to count as that. Rows of a worker
        that is lost start anew. Raises ``DeviceError`` where workers are lost before they finish anything, and what
        workers tell that they cannot go on after."""
        unanswerable = prompts.rows(lambda line: skip(line) or prompts.samples_of(line) > 0)
        while bad := [Failed(row, row.reason) for row in islice(unanswerable, MOST_BAD) if isinstance(row, BadRow)]:
            yield list(bad)
        while (wanted := Wanted.of(prompts, skip)).count:
            finished = 0
            lost: Exception | None = None
            try:
                for message in self._messages(wanted):
                    self._told[message.worker] = replace(message, finished=(), error=None)
                    fresh = [each for each in message.finished if _is_fresh(each, skip, missing)]
                    finished += len(fresh)
                    yield fresh
                    if message.error is not None:
                        raise message.error
            except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
                lost = error
            if not finished:
                raise DeviceError(
                    f"the workers on Ray were lost before they finished any of the {wanted.count} rows that are left"
                    f"{_why(lost)}: see the logs of Ray, and give workers less memory if a machine had none left; what "
                    "was finished is written"
                )

    def _messages(self, wanted: Wanted) -> Iterator[Message]:
        """What workers tell of the rows ``wanted``. Of workers that are lost, rows may be missing."""
        flow = self._spread.flow(wanted.count, self._settings.sequences)
        with _unwarned():
            dataset = ray.data.read_datasource(Prompts(wanted, flow.rows), override_num_blocks=1, num_cpus=0)
            context = dataset.context
            context.enable_progress_bars = context.print_on_execution_start = False
            context.execution_no_progress_timeout_s = SILENT_SECONDS
            context.target_max_block_size = 1  # a block for each message, which Ray passes on at once
            context.max_errored_blocks = flow.chunks * flow.workers * MOST_LOST
            answered = dataset.map_batches(
                Worker,
                fn_constructor_args=(self._settings, self._workload, self.tokens),
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=flow.workers, max_tasks_in_flight_per_actor=flow.chunks, enable_true_multi_threading=True
                ),
                num_cpus=self._spread.cpus,
                num_gpus=self._spread.gpus,
                max_concurrency=flow.chunks,
                max_restarts=-1,
                max_task_retries=0,  # Ray drops what a task told before from what it tells again: rows would be missing
            )
            batches = iter(answered.iter_batches(batch_size=None, batch_format="pyarrow"))
        for batch in batches:
            for raw in batch.column("message"):
                yield Message.from_bytes(raw.as_py())


@contextmanager
def open_ray_job(
    settings: JobSettings, workload: Workload, *, tokens: int | None = None, workers: int | None = None
) -> Iterator[RayJob]:
    """A job on the cluster that Ray is connected to, or finds as ``ray.init()`` does, else on this machine.

    ``workers`` is how many there are, None for one on each GPU, or on each machine where there is none. ``tokens`` of a
    micro-batch are those of an earlier run of the job; None: one worker measures which are fastest.

    Raises ``DeviceError`` for a cluster that has not what is asked for, and what that worker raises."""
    with _connected(), _quiet():
        if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
            raise DeviceError(
                "Ray is connected through its client, and the files of a job are then not where its tasks run: run it "
                "on a machine of the cluster"
            )
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        shares = spread(nodes, settings.device, workers)
        settings = _anywhere(settings, shares)
        notes: tuple[str, ...] = ()
        if (chosen := settings.tokens if tokens is None else tokens) is None:
            chosen, notes = _measured(settings, workload, shares)
        yield RayJob(settings, workload, shares, chosen, notes)


def _anywhere(settings: JobSettings, shares: Spread) -> JobSettings:
    """Settings that mean the same in every process, wherever it stands."""
    model, store, draft = (
        None if path is None else os.path.abspath(path) for path in (settings.model, settings.store, settings.draft)
    )
    assert model is not None, "a job has a model"
    return replace(settings, device=shares.device, model=model, store=store, draft=draft)


def _why(error: Exception | None) -> str:
    """The last line of what Ray says, which is where the cause stands."""
    if error is None:
        return ""
    if isinstance(error, ExecutionTimeoutError):
        return f" (none of them gave a sign for {SILENT_SECONDS} s)"
    lines = str(error).strip().splitlines() or [""]
    return f" ({type(error).__name__}: {lines[-1].strip()[:300]})"


def _measured(settings: JobSettings, workload: Workload, shares: Spread) -> tuple[int, tuple[str, ...]]:
    remote: Any = ray.remote(max_calls=1)(choose)
    try:
        told = ray.get(remote.options(num_cpus=shares.cpus, num_gpus=shares.gpus).remote(settings, workload))
    except ray.exceptions.RayError as error:
        raise DeviceError(
            f"the worker on Ray that was to measure the model was lost{_why(error)}: see the logs of Ray, and give "
            "workers less memory if a machine had none left"
        ) from error
    if "error" in told:
        raise error_of(told["error"])
    return told["tokens"], tuple(told["notes"])


def _is_fresh(each: Finished | Failed, skip: Skip, missing: Missing) -> bool:
    if skip(each.row.line):
        return False
    return isinstance(each, Failed) or each.index in missing(each.row)


@contextmanager
def _connected() -> Iterator[None]:
    """Ray, as it is, or for as long as the ``with`` lasts."""
    if ray.is_initialized():
        yield
        return
    try:
        try:
            with _unwarned():
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # a start that takes too long is just an Exception
            raise DeviceError(
                f"Ray does not start{_why(error)}: check its address, or the memory of this machine"
            ) from error
        yield
    finally:
        ray.shutdown()


@contextmanager
def _unwarned() -> Iterator[None]:
    """Ray warns of its own defaults, and of options that have no other name yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data tells its log file, and not the terminal, about workers that are lost."""
    handlers = [handler for handler in logging.getLogger("ray.data").handlers if handler.name == "console"]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
