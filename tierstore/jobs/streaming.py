"""`stream`: rows go in as they come, and results come out as they are finished, for asyncio."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractContextManager, ExitStack, aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tierstore.jobs.compute_thread import compute_thread
from tierstore.jobs.engine import Engine
from tierstore.jobs.ids import Id
from tierstore.jobs.lines import Line
from tierstore.jobs.opening import open_job
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.rows import BadRow, Row, parse_row
from tierstore.jobs.samples import Failed, Finished
from tierstore.jobs.settings import JobSettings
from tierstore.jobs.workload import Workload
from tierstore.sampling import Sampling

ROWS_AHEAD = 64
"""Rows that are taken from where they come before the job asks for them."""
RESULTS_AHEAD = 16
"""Passes whose results wait for whoever reads them; then the job waits too."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished text of row ``id``, the ``line``-th from 1, or the ``error`` why there is none, else None.

    ``index`` is which of the row's ``n`` texts it is. ``finish_reason`` is "stop" or "length"."""

    id: Id | None
    line: int
    index: int
    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    seed: int | None
    error: str | None


async def stream(
    rows: str | Path | Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]], settings: JobSettings
) -> AsyncGenerator[Result]:
    """The results of ``rows``, in any order: tables as the lines of a file of prompts have them, or such a file's path.

    An iterable that is not asynchronous is read in the event loop, and should not block. A row that cannot be answered
    is a result with an ``error``. The model is opened and computes in one thread, which ends, after the pass that is
    under way, when the generator is closed or its task cancelled, and all is released then; ``rows``, if it is a
    generator, is closed. A reader that is slow holds up the job.

    Raises what ``tierstore.load`` raises, ``StoreError`` for a file that cannot be read, and what ``rows`` raises."""
    with ExitStack() as closing:
        if isinstance(rows, str | Path):
            prompts = closing.enter_context(PromptFile(rows, settings.defaults))
            workload = Workload.of(prompts.rows(), prompts.samples_total, settings.defaults)
            parsed = _each(prompts.rows())
        else:
            workload, parsed = Workload.unknown(settings.defaults), _parsed(rows, settings.defaults)
        async with aclosing(_streamed(parsed, partial(open_job, settings, workload))) as results:
            async for result in results:
                yield result


class HasEngine(Protocol):
    """What a job is done with."""

    @property
    def engine(self) -> Engine: ...


Opened = Callable[[], AbstractContextManager[HasEngine]]


async def _streamed(rows: AsyncGenerator[Row | BadRow], opened: Opened) -> AsyncGenerator[Result]:
    """Results of ``rows``, computed in a thread that opens the job and closes it."""
    worker = _Worker(opened)
    feeding = asyncio.ensure_future(worker.feed(rows))
    try:
        async for some in worker.results():
            for result in some:
                yield result
        await feeding  # raises what came of the rows
    finally:
        feeding.cancel()
        try:
            await worker.end()
        finally:
            with suppress(asyncio.CancelledError, Exception):
                await feeding
            await rows.aclose()


class _Worker:
    """A thread that answers rows, and the two queues between it and the event loop that it was made in."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._rows: queue.SimpleQueue[Row | BadRow | None] = queue.SimpleQueue()
        self._results: asyncio.Queue[list[Result] | BaseException | None] = asyncio.Queue()
        self._rows_free = asyncio.Semaphore(ROWS_AHEAD)
        self._results_free = threading.Semaphore(RESULTS_AHEAD)
        self._over = asyncio.Event()
        self._thread = compute_thread(self._work, "tierstore-job")
        self._thread.start()

    # ---- in the event loop

    async def feed(self, rows: AsyncIterator[Row | BadRow]) -> None:
        """Give the thread ``rows`` as it takes them, and tell it when there are no more."""
        try:
            async for row in rows:
                await self._rows_free.acquire()
                self._rows.put(row)
        finally:
            self._rows.put(None)

    async def results(self) -> AsyncIterator[list[Result]]:
        """What is finished, until all is. Raises what the thread raises."""
        while (got := await self._results.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            yield got
            self._results_free.release()

    async def end(self) -> None:
        """Wait until the thread has ended, which it does after the pass under way, and everything is released."""
        self._stopped = True
        self._rows.put(None)
        self._results_free.release()
        cancelled = False
        while not self._over.is_set():
            try:
                await self._over.wait()
            except asyncio.CancelledError:
                cancelled = True  # once more: nothing may be left behind even so
        self._thread.join()
        if cancelled:
            raise asyncio.CancelledError

    # ---- in the thread

    def _work(self) -> None:
        end: BaseException | None = None
        try:
            with self._opened() as job:
                for some in job.engine.answer(self._given(job.engine)):
                    if some and not self._stopped:
                        self._results_free.acquire()
                        self._tell(self._results.put_nowait, [_result(each) for each in some])
                    if self._stopped:
                        break
        except BaseException as error:
            end = error
        with suppress(RuntimeError):  # the event loop is closed: nobody is there to be told
            self._tell(self._results.put_nowait, end)
            self._tell(self._over.set)

    def _given(self, engine: Engine) -> Iterator[Row | BadRow | None]:
        while not self._stopped:
            try:
                row = self._rows.get(block=engine.idle)
            except queue.Empty:
                yield None
                continue
            if row is None:
                return
            self._tell(self._rows_free.release)
            yield row

    def _tell(self, act: Callable[..., object], *args: object) -> None:
        self._loop.call_soon_threadsafe(act, *args)


async def _each(rows: Iterable[Row | BadRow]) -> AsyncGenerator[Row | BadRow]:
    for row in rows:
        yield row


async def _parsed(
    rows: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]], defaults: Sampling
) -> AsyncGenerator[Row | BadRow]:
    number = 0
    try:
        if isinstance(rows, AsyncIterable):
            async for table in rows:
                number += 1
                yield _row_of(table, number, defaults)
        else:
            for table in rows:
                number += 1
                yield _row_of(table, number, defaults)
    finally:  # a generator has things open, too, and nobody else may know of it
        if isinstance(rows, AsyncGenerator):
            await rows.aclose()
        elif isinstance(rows, Generator):
            rows.close()


def _row_of(table: Mapping[str, Any], number: int, defaults: Sampling) -> Row | BadRow:
    """As if it were a line of a file."""
    try:
        raw = json.dumps(dict(table), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return BadRow(number, None, f"the row is nothing that JSON can say: {error}")
    return parse_row(Line(number, 0, raw, True), defaults) or BadRow(number, None, "the row is empty")


def _result(each: Finished | Failed) -> Result:
    row = each.row
    if isinstance(each, Failed):
        return Result(row.id, row.line, 0, "", 0, 0, "", None, each.reason)
    return Result(
        row.id,
        row.line,
        each.index,
        each.text,
        each.prompt_tokens,
        len(each.tokens),
        each.finish_reason,
        each.seed,
        None,
    )
