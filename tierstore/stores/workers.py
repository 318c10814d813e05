"""Threads that carry out reads and writes in the order submitted, and the fence that says when one is whole."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Sequence
from queue import SimpleQueue
from time import perf_counter
from typing import Protocol

import torch

from tierstore.contracts import Buffer
from tierstore.errors import StoreError, StoreReadError

PAGE = 4096
"""Bytes: the largest alignment a filesystem asks of O_DIRECT, and the widest gap worth reading across."""
SMALL = 64 << 10
"""Bytes: below this a copy costs less than a read of its own."""

_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view_of.restype = ctypes.py_object
# Small moves keep the interpreter lock: taking it back from a busy thread may cost 5 ms.
_move_small = ctypes.PyDLL(None).memmove
_move_small.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_small.restype = ctypes.c_void_p


def move_bytes(dst: int, src: int, nbytes: int) -> None:
    """Copy ``nbytes`` between host addresses; large copies release the interpreter lock."""
    (_move_small if nbytes < SMALL else ctypes.memmove)(dst, src, nbytes)


def view_of(address: int, nbytes: int) -> memoryview:
    """Writable host memory, without a copy. The caller keeps it allocated."""
    view: memoryview = _view_of(address, nbytes, 0x200)  # PyBUF_WRITE
    return view


def buffer_address(buffer: Buffer, nbytes: int) -> int:
    """The host address of a buffer of exactly ``nbytes``, or ``StoreError``."""
    if buffer.numel() != nbytes:
        raise StoreError(f"a buffer of {nbytes} bytes is needed, got {buffer.numel()}: slice it to the extent")
    if isinstance(buffer, torch.Tensor) and not (buffer.is_cpu and buffer.is_contiguous()):
        raise StoreError("a contiguous buffer in host memory is needed: copy it there first")
    return buffer.data_ptr()


class ReadFence:
    """Complete when every job of one ``read`` is. ``started`` and ``finished`` are ``time.perf_counter``
    readings in seconds (0.0 until then); ``nbytes`` is what was asked for."""

    __slots__ = ("_error", "_keep", "_left", "_lock", "_over", "finished", "nbytes", "started")

    def __init__(self, nbytes: int, keep: Sequence[object]) -> None:
        self.nbytes = nbytes
        self.started = self.finished = 0.0
        self._keep = tuple(keep)  # buffers stay allocated while threads write to them
        self._left = 0
        self._error: StoreError | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()

    def expect(self, jobs: int) -> None:
        """Be complete after ``jobs`` calls of ``finish``; at once when there are none."""
        self._left = jobs
        if jobs == 0:
            self.started = perf_counter()
            self._end()

    def begin(self) -> bool:
        """Note that a job starts; False when the read has failed already and the job is not needed."""
        if not self.started:
            self.started = perf_counter()
        return self._error is None

    def finish(self, error: StoreError | None = None) -> None:
        """One job is over."""
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = self._left == 0
        if last:
            self._end()

    def _end(self) -> None:
        self.finished = perf_counter()
        self._keep = ()
        self._over.set()

    def done(self) -> bool:
        """Whether no thread touches the buffers any more."""
        return self._over.is_set()

    def wait(self) -> None:
        """Block until done; raise ``StoreReadError`` unless every byte arrived."""
        self._over.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)

    gate = wait

    def settle(self) -> None:
        """Block until done, whatever came of it."""
        self._over.wait()


class Job(Protocol):
    """Something for one worker thread to do. ``run`` may use ``scratch``, page-aligned memory of the thread."""

    @property
    def fence(self) -> ReadFence: ...

    def run(self, scratch: memoryview, address: int) -> None: ...


class Workers:
    """A few daemon threads that take jobs in the order submitted. Dropping the object ends them too."""

    def __init__(self, threads: int, scratch_nbytes: int = PAGE, *, name: str = "read") -> None:
        if threads < 1:
            raise StoreError(f"threads is {threads}: a store needs at least 1 thread to read with")
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._closed = threading.Event()
        self._submitting = threading.Lock()
        self._threads = [
            threading.Thread(
                target=_work,
                args=(self._queue, self._closed, scratch_nbytes),
                name=f"tierstore-{name}-{number}",
                daemon=True,
            )
            for number in range(threads)
        ]
        self._dismiss = weakref.finalize(self, _dismiss, self._queue, self._closed, threads)
        for thread in self._threads:
            thread.start()

    def submit(self, fence: ReadFence, jobs: Sequence[Job]) -> None:
        """Queue ``jobs``, all of ``fence``. Raises ``StoreError`` after ``close``."""
        with self._submitting:  # so that no job lands behind the signal to end
            if self._closed.is_set():
                raise StoreError("the store is closed: open it again")
            fence.expect(len(jobs))
            for job in jobs:
                self._queue.put(job)

    def close(self) -> None:
        """Fail what is queued, wait for what is running, end the threads. Idempotent."""
        with self._submitting:
            self._dismiss()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()


def _dismiss(queue: SimpleQueue[Job | None], closed: threading.Event, threads: int) -> None:
    closed.set()
    for _ in range(threads):
        queue.put(None)


def _work(queue: SimpleQueue[Job | None], closed: threading.Event, scratch_nbytes: int) -> None:
    scratch = mmap.mmap(-1, scratch_nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(scratch))
    view = memoryview(scratch)
    while (job := queue.get()) is not None:
        fence = job.fence
        error: StoreError | None = None
        if closed.is_set():
            error = StoreReadError("the store was closed before this was begun: wait for it before closing")
        elif fence.begin():
            try:
                job.run(view, address)
            except StoreError as problem:
                error = problem
            except Exception as problem:  # a thread that died would leave its fence waiting for ever
                error = StoreReadError(f"a read failed: {reason_of(problem)}")
                error.__cause__ = problem
        del job  # an idle thread must not keep buffers or descriptors alive
        fence.finish(error)
        del fence, error


def reason_of(error: BaseException) -> str:
    """What an error says, without the path that the message around it names already."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
