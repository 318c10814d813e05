"""Runs one job in a process of its own: a line of JSON in on stdin, one out as the last line of stdout.

A job that prints ``PAUSE`` waits for a line on stdin: meanwhile something else is measured beside it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmark.cap import Hierarchy, MemoryCap, drop_caches
from benchmark.job import DONE, FORK, PAUSE, Job

SCRIPTS = Path(__file__).resolve().parent.parent
_JOIN = 'echo $$ > "$0" && exec "$@"'


class ChildError(RuntimeError):
    """A job gave no result: it ended with an error, was killed, or took too long."""


class Children:
    """Runs jobs one at a time, each in a process of its own. With ``cap_nbytes`` caches are dropped first, and jobs may
    ask for the cap. ``quick`` processes are forked from one that has imported everything, which ends when this is
    closed: for runs whose figures do not count."""

    def __init__(self, cap_nbytes: int | None, *, timeout_seconds: float, quick: bool = False) -> None:
        if quick and cap_nbytes is not None:
            raise ValueError("a forked process cannot be capped from its start: give cap_nbytes or quick")
        self._cap_nbytes = cap_nbytes
        self._hierarchy = Hierarchy.found() if cap_nbytes is not None else None
        self._timeout_seconds = timeout_seconds
        self._quick = quick
        self._forking: _Process | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._forking is not None:
            self._forking.close()

    def run(self, job: Job, *, capped: bool, on_pause: Callable[[], None]) -> dict[str, Any]:
        """What the job measured; with a cap also ``cgroup_peak_nbytes``. Raises ``ChildError``."""
        command = [sys.executable, "-m", "benchmark.jobs"]
        if self._quick:
            self._forking = self._forking or _Process([*command, FORK], job.threads)
            try:
                return self._forking.run(job, self._timeout_seconds, on_pause)
            except ChildError:
                self._forking.close()
                self._forking = None
                raise
        with ExitStack() as closing:
            cap: MemoryCap | None = None
            if self._hierarchy is not None and self._cap_nbytes is not None:
                drop_caches()
                if capped:
                    cap = closing.enter_context(MemoryCap(self._cap_nbytes, self._hierarchy))
            if cap is not None:
                command = ["sh", "-c", _JOIN, str(cap.processes), *command]
            process = _Process(command, job.threads)
            closing.callback(process.close)
            result = process.run(job, self._timeout_seconds, on_pause)
            if cap is not None:
                result["cgroup_peak_nbytes"] = cap.peak_nbytes()
            return result


class _Process:
    """One of ``benchmark.jobs``: it has done its job when it ends, or when it says ``DONE``."""

    def __init__(self, command: list[str], threads: int) -> None:
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process is)
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=_environment(threads),
            process_group=0,
        )

    def run(self, job: Job, timeout_seconds: float, on_pause: Callable[[], None]) -> dict[str, Any]:
        """What the job measured. Raises ``ChildError``."""
        late = threading.Event()

        def end_late() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(timeout_seconds, end_late)
        timer.start()
        try:
            last, status = self._talk(job, on_pause)
        finally:
            timer.cancel()
        if late.is_set():
            raise ChildError(f"{job.kind} took more than {timeout_seconds:.0f} s and was ended")
        if status < 0:
            raise ChildError(f"{job.kind} was killed by {signal.Signals(-status).name}")
        if status:
            self._complaints.seek(0)
            raise ChildError(f"{job.kind} ended with status {status}:\n{self._complaints.read()[-4000:]}")
        result: dict[str, Any] = json.loads(last)
        return result

    def close(self) -> None:
        """Kill it, and what it forked."""
        self._kill()
        self._child.communicate()
        self._complaints.close()

    def _talk(self, job: Job, on_pause: Callable[[], None]) -> tuple[str, int]:
        """Hand the job over and answer pauses; the last line that the job said, and its status."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        last = ""
        with suppress(BrokenPipeError):  # a child that dies says why elsewhere
            print(json.dumps(asdict(job)), file=self._child.stdin, flush=True)
            for line in self._child.stdout:
                if line.rstrip() == DONE:
                    return last, 0
                last = line
                if line.rstrip() == PAUSE:
                    on_pause()
                    print(file=self._child.stdin, flush=True)
        return last, self._child.wait()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)


def _environment(threads: int) -> Mapping[str, str]:
    paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # bytes written are counted
        "TOKENIZERS_PARALLELISM": "false",
    }
