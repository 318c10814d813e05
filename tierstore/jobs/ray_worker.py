"""A worker of a job on Ray: one process with a model, which answers many chunks of rows at the same time."""

from __future__ import annotations

import os
import queue
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tierstore.errors import DeviceError, TierstoreError
from tierstore.jobs.compute_thread import compute_thread
from tierstore.jobs.engine import Counts, Engine
from tierstore.jobs.opening import OpenJob, open_job
from tierstore.jobs.ray_errors import error_of, error_table
from tierstore.jobs.ray_messages import Message
from tierstore.jobs.ray_source import Chunk
from tierstore.jobs.rows import BadRow, Row, parse_row
from tierstore.jobs.samples import Failed, Finished
from tierstore.jobs.settings import JobSettings
from tierstore.jobs.workload import Workload

if TYPE_CHECKING:
    import pyarrow

EVERY_SECONDS = 10.0
"""A worker tells what it did at least so often, also while no text is finished."""

Finishing = list[Finished | Failed]
Opened = Callable[[], AbstractContextManager[OpenJob]]


class Worker:
    """Answers chunks of rows with the model of ``settings``, for ``map_batches``; several threads may call it at once.

    The model is opened once, with micro-batches of ``tokens`` tokens, in a thread that computes for all calls: a batch
    is refilled from whatever chunk has rows left. What goes wrong is told in messages: Ray would wrap what is raised.
    """

    def __init__(self, settings: JobSettings, workload: Workload, tokens: int) -> None:
        self._defaults = settings.defaults
        self._answering = Answering(partial(open_job, settings, workload, tokens=tokens))

    def __call__(self, table: pyarrow.Table) -> Iterator[dict[str, list[bytes]]]:
        """Messages, as they come up, of the one chunk in ``table``."""
        chunk = Chunk.from_bytes(table.column(0)[0].as_py())
        if chunk.error is not None:
            yield {"message": [self._answering.message((), chunk.error).to_bytes()]}
            return
        rows = [row for line in chunk.lines if (row := parse_row(line, self._defaults)) is not None]
        for message in self._answering.answer(rows):
            yield {"message": [message.to_bytes()]}

    def __del__(self) -> None:
        if hasattr(self, "_answering"):
            self._answering.close()


class Answering:
    """A thread that opens a job and answers rows with it until ``close``."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._name = f"{socket.gethostname()} {os.getpid()}"
        self._rows: queue.SimpleQueue[Row | BadRow | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._boxes: dict[int, queue.SimpleQueue[Finishing | None]] = {}
        self._job: OpenJob | None = None
        self._error: TierstoreError | None = None
        self._closed = False
        self._thread = compute_thread(self._work, "tierstore-ray-worker")
        self._thread.start()

    def answer(self, rows: Sequence[Row | BadRow]) -> Iterator[Message]:
        """Messages with what became of ``rows``, until all are done; and without, now and then. May be called by
        several threads at once, for different rows."""
        left = {row.line: row.sampling.n if isinstance(row, Row) else 1 for row in rows}
        box: queue.SimpleQueue[Finishing | None] = queue.SimpleQueue()
        with self._lock:
            if self._error is None:
                self._boxes |= dict.fromkeys(left, box)
                for row in rows:
                    self._rows.put(row)
            else:
                box.put(None)
        try:
            while left:
                try:
                    finished = box.get(timeout=EVERY_SECONDS)
                except queue.Empty:
                    finished = []
                if finished is None:
                    yield self.message((), self._error)
                    return
                for each in finished:
                    line = each.row.line
                    left[line] = 0 if isinstance(each, Failed) else left[line] - 1
                    if not left[line]:
                        del left[line]
                yield self.message(finished)
        finally:
            with self._lock:
                for row in rows:
                    self._boxes.pop(row.line, None)

    def message(self, finished: Sequence[Finished | Failed], error: TierstoreError | None = None) -> Message:
        """What is ``finished``, and what was done so far."""
        job = self._job
        counts, moved = (Counts(), 0) if job is None else (replace(job.counts), job.moved_nbytes)
        return Message(self._name, counts, moved, finished, error)

    def close(self) -> None:
        """End after the pass that is under way, and release everything. Idempotent."""
        self._closed = True
        self._rows.put(None)
        self._thread.join()

    def _work(self) -> None:
        error: BaseException = DeviceError("the worker is closed")
        try:
            with self._opened() as self._job:
                engine = self._job.engine
                for finished in engine.answer(self._given(engine)):
                    self._tell(finished)
                    if self._closed:
                        break
        except BaseException as came:
            error = came
            if not isinstance(came, TierstoreError):
                traceback.print_exception(came)  # into Ray's log of this process
        with self._lock:
            self._error = error_of(error_table(error, f"on {self._name.split()[0]}: "))
            for box in self._boxes.values():
                box.put(None)

    def _given(self, engine: Engine) -> Iterator[Row | BadRow | None]:
        while True:
            try:
                row = self._rows.get(block=engine.idle)
            except queue.Empty:
                yield None
                continue
            if row is None:
                return
            yield row

    def _tell(self, finished: Finishing) -> None:
        with self._lock:
            parts: dict[int, tuple[queue.SimpleQueue[Finishing | None], Finishing]] = {}
            for each in finished:
                box = self._boxes.get(each.row.line)
                if box is not None:  # else whoever asked has gone
                    parts.setdefault(id(box), (box, []))[1].append(each)
        for box, some in parts.values():
            box.put(some)


def choose(settings: JobSettings, workload: Workload) -> dict[str, Any]:
    """How many tokens a micro-batch has, for all workers, measured where this runs, and notes that say why; or an
    error."""
    try:
        with open_job(settings, workload) as job:
            return {"tokens": job.plan.tokens, "notes": job.notes}
    except BaseException as error:
        return {"error": error_table(error, f"on {socket.gethostname()}: ")}
