"""Rows go in as they come, results come out as they are finished, and whatever ends it leaves nothing behind."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.jobs.test_engine import alone, engine_of, row_of
from tests.jobs.toy import ToyModel
from tests.torch_threads import threads
from tierstore.errors import StoreReadError
from tierstore.jobs import streaming
from tierstore.jobs.engine import Engine
from tierstore.jobs.streaming import Result, _each, _parsed, _streamed
from tierstore.sampling import Sampling

DEFAULTS = Sampling(max_new_tokens=5)


@dataclass
class Job:
    """Stands for an opened job, and knows whether it is released."""

    model: ToyModel = field(default_factory=ToyModel)
    fails: BaseException | None = None
    opened: int = 0
    closed: int = 0

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def __call__(self) -> Iterator[Job]:
        if self.fails is not None:
            raise self.fails
        self.opened += 1
        self._engine = engine_of(self.model)
        try:
            yield self
        finally:
            self.closed += 1


async def results_of(rows: Any, job: Job) -> list[Result]:
    return [result async for result in _streamed(_parsed(rows, DEFAULTS), job)]


def tables(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{number}", "prompt": f"hello {'abc'[number % 3]}"} for number in range(1, count + 1)]


def check(results: Sequence[Result], count: int) -> None:
    assert sorted(result.line for result in results) == list(range(1, count + 1))
    for result in results:
        row = row_of(result.line, f"hello {'abc'[result.line % 3]}", max_new_tokens=5)
        text, reason, tokens = alone(row, 0)
        assert (result.id, result.text, result.finish_reason) == (f"r{result.line}", text, reason)
        assert (result.completion_tokens, result.error) == (tokens, None)


async def test_rows_of_a_list() -> None:
    job = Job()
    check(await results_of(tables(150), job), 150)
    assert (job.opened, job.closed) == (1, 1)


async def test_as_many_threads_compute_as_where_it_was_called() -> None:
    counted = ctypes.CDLL(None).omp_get_max_threads  # what matrix products go by; torch.get_num_threads asks for others
    seen: list[int] = []

    @contextmanager
    def opened() -> Iterator[Any]:
        seen.append(counted())
        with Job()() as job:
            yield job

    for count in (1, 3):
        with threads(count):
            assert not [result async for result in _streamed(_parsed([], DEFAULTS), opened)]
    assert seen == [1, 3]


async def test_no_rows() -> None:
    assert await results_of([], Job()) == []


async def test_a_row_may_wait_for_the_result_of_another() -> None:
    """Neither a result nor a failure waits for the row after it."""
    job, got = Job(), asyncio.Event()
    results = []

    async def rows() -> AsyncIterator[dict[str, Any]]:
        for table in [*tables(3), {"prompt": 7}]:
            got.clear()
            yield table
            await got.wait()

    async for result in _streamed(_parsed(rows(), DEFAULTS), job):
        results.append(result)
        got.set()
    check(results[:3], 3)
    assert "prompt" in str(results[3].error)


async def test_rows_that_cannot_be_answered_are_results_with_an_error() -> None:
    rows: list[Any] = [{"prompt": "abc", "top_p": 7}, {"prompt": {1, 2}}, {}, {"prompt": "123", "id": "empty"}]
    results = {result.line: result for result in await results_of(rows, Job())}
    assert sorted(results) == [1, 2, 3, 4]
    assert "top_p" in str(results[1].error)
    assert "JSON" in str(results[2].error)
    assert results[3].error
    assert results[4].id == "empty"
    assert all(result.text == "" for result in results.values())


@pytest.mark.parametrize("end", ["close", "break", "cancel", "error"])
async def test_whoever_stops_reading_stops_the_job(end: str) -> None:
    job = Job()
    stream = _streamed(_parsed(({"prompt": "abc"} for _ in iter(int, 1)), DEFAULTS), job)  # without end

    async def read() -> None:
        async for _ in stream:
            if end == "break":
                break
            if end == "error":
                raise ZeroDivisionError
            if end == "close":
                await stream.aclose()
            if end == "cancel":
                reading.cancel()

    reading = asyncio.create_task(read())
    (found,) = await asyncio.gather(reading, return_exceptions=True)
    await stream.aclose()
    kinds = {"cancel": asyncio.CancelledError, "error": ZeroDivisionError}
    assert type(found) is kinds.get(end, type(None))
    assert (job.opened, job.closed) == (1, 1)


@pytest.mark.parametrize("kind", ["asynchronous", "plain"])
async def test_a_generator_of_rows_is_closed_with_the_job(kind: str) -> None:
    closed: list[str] = []

    async def coming() -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                yield {"prompt": "abc"}
        finally:
            closed.append("asynchronous")

    def there() -> Iterator[dict[str, Any]]:
        try:
            while True:
                yield {"prompt": "abc"}
        finally:
            closed.append("plain")

    stream = _streamed(_parsed(coming() if kind == "asynchronous" else there(), DEFAULTS), Job())
    async for _ in stream:
        break
    await stream.aclose()
    assert closed == [kind]


async def test_cancelled_before_the_first_result() -> None:
    job = Job()

    async def rows() -> AsyncIterator[dict[str, Any]]:
        yield {"prompt": "abc"}
        reading.cancel()
        await asyncio.Event().wait()

    reading = asyncio.create_task(results_of(rows(), job))
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert job.opened == job.closed


@pytest.mark.parametrize("job", [Job(fails=StoreReadError("gone")), Job()])
async def test_errors_of_the_machine_come_out(job: Job) -> None:
    if job.fails is None:
        job.model.fail = [None, StoreReadError("gone")]
    with pytest.raises(StoreReadError, match="gone"):
        await results_of(tables(9), job)
    assert job.opened == job.closed


async def test_errors_of_the_rows_come_out_after_what_was_given() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from tables(3)
        raise ZeroDivisionError

    job = Job()
    results: list[Result] = []

    async def read() -> None:
        async for result in _streamed(_parsed(rows(), DEFAULTS), job):
            results.append(result)

    with pytest.raises(ZeroDivisionError):
        await read()
    check(results, 3)
    assert (job.opened, job.closed) == (1, 1)


async def test_a_slow_reader_holds_up_the_job() -> None:
    job, taken = Job(), 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for table in tables(3000):
            taken += 1
            yield table

    async for _ in _streamed(_parsed(rows(), DEFAULTS), job):
        while job.model.calls < streaming.RESULTS_AHEAD:
            await asyncio.sleep(0)
        break
    most = streaming.ROWS_AHEAD + 5 * (streaming.RESULTS_AHEAD + 4) + 64
    assert taken <= most


async def test_rows_that_are_parsed_already() -> None:
    rows = [row_of(1, "hello b", max_new_tokens=5)]
    job = Job()
    check([result async for result in _streamed(_each(rows), job)], 1)
