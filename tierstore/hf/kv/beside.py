"""Compute beside the thread that brings pages, on a CPU: what a GPU does by itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch

from tierstore.kernels.machine_code import rest_between_work

T = TypeVar("T")


class Task(Generic[T]):
    """A fence of work on another thread; what the work raises comes out of ``result`` alone."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether the work is over, well or not."""
        return self._future.done()

    def wait(self) -> None:
        """Block until it is."""
        wait((self._future,))

    gate = wait

    def result(self) -> T:
        """Block until it is over; what it gave. Raises what it raised."""
        return self._future.result()


class Beside:
    """As many threads as torch may compute with where it was made; they are started when there is work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(
            torch.get_num_threads(), thread_name_prefix="tierstore-attention", initializer=rest_between_work
        )

    def start(self, work: Callable[[], T]) -> Task[T]:
        """Begin ``work``, which is over before its task is."""
        return Task(self._threads.submit(work))

    def close(self) -> None:
        """Wait for what is under way, and end the threads. Idempotent."""
        self._threads.shutdown()
