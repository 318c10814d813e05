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
from typing import Any

from benchmark.cap import Hierarchy, MemoryCap, drop_caches
from benchmark.job import PAUSE, Job

SCRIPTS = Path(__file__).resolve().parent.parent
_JOIN = 'echo $$ > "$0" && exec "$@"'


class ChildError(RuntimeError):
    """A job gave no result: it ended with an error, was killed, or took too long."""


class Children:
    """Runs jobs one at a time. With ``cap_nbytes`` caches are dropped first, and jobs may ask for the cap."""

    def __init__(self, cap_nbytes: int | None, *, timeout_seconds: float) -> None:
        self._cap_nbytes = cap_nbytes
        self._hierarchy = Hierarchy.found() if cap_nbytes is not None else None
        self._timeout_seconds = timeout_seconds

    def run(self, job: Job, *, capped: bool, on_pause: Callable[[], None]) -> dict[str, Any]:
        """What the job measured; with a cap also ``cgroup_peak_nbytes``. Raises ``ChildError``."""
        with ExitStack() as closing:
            cap: MemoryCap | None = None
            if self._hierarchy is not None and self._cap_nbytes is not None:
                drop_caches()
                if capped:
                    cap = closing.enter_context(MemoryCap(self._cap_nbytes, self._hierarchy))
            command = [sys.executable, "-m", "benchmark.jobs"]
            if cap is not None:
                command = ["sh", "-c", _JOIN, str(cap.processes), *command]
            result = _run(command, job, self._timeout_seconds, on_pause)
            if cap is not None:
                result["cgroup_peak_nbytes"] = cap.peak_nbytes()
            return result


def _run(command: list[str], job: Job, timeout_seconds: float, on_pause: Callable[[], None]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=_environment(job.threads),
            process_group=0,
        )
        late = threading.Event()

        def end_late() -> None:
            late.set()
            _kill(child)

        timer = threading.Timer(timeout_seconds, end_late)
        timer.start()
        try:
            last = _talk(child, job, on_pause)
            child.wait()
        finally:
            timer.cancel()
            _kill(child)
            child.communicate()
        if late.is_set():
            raise ChildError(f"{job.kind} took more than {timeout_seconds:.0f} s and was ended")
        if child.returncode < 0:
            raise ChildError(f"{job.kind} was killed by {signal.Signals(-child.returncode).name}")
        if child.returncode:
            complaints.seek(0)
            raise ChildError(f"{job.kind} ended with status {child.returncode}:\n{complaints.read()[-4000:]}")
    result: dict[str, Any] = json.loads(last)
    return result


def _talk(child: subprocess.Popen[str], job: Job, on_pause: Callable[[], None]) -> str:
    """Hand the job over and answer pauses; the last line that the child said."""
    assert child.stdin is not None
    assert child.stdout is not None
    last = ""
    with suppress(BrokenPipeError):  # a child that dies says why elsewhere
        print(json.dumps(asdict(job)), file=child.stdin, flush=True)
        for line in child.stdout:
            last = line
            if line.rstrip() == PAUSE:
                on_pause()
                print(file=child.stdin, flush=True)
    return last


def _kill(child: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _environment(threads: int) -> Mapping[str, str]:
    paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # bytes written are counted
        "TOKENIZERS_PARALLELISM": "false",
    }
