"""A program: kills a job's bookkeeping before each of its system calls in turn, and looks at what is left.

Usage: ``killed.py FOLDER``: prints how many places it was killed at; fails where the next run does not complete the job
with every sample once. ``killed.py loop PROMPTS RESULTS``: answers, committing and printing a line for each, until it
is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.jobs.made import DEFAULTS, answers, finish, opened, request, text_of, write_rows
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.rows import BadRow

CALLS = ("open", "write", "ftruncate", "fsync", "replace", "unlink")
ROWS = [
    {"id": "a", "prompt": "x"},
    b"{",
    {"id": "b", "prompt": "x", "n": 2},
    request("c", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
]
ALL = {("a", 0), ("b", 0), ("b", 1), ("c", 0)}


def kill_before(call: int) -> None:
    """From now on this process dies before its ``call``-th system call, or in the middle of it if that writes."""
    left = call

    def deadly(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                if name == "write":
                    plain(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return plain(*arguments, **options)

        return run

    for name in CALLS:
        setattr(os, name, deadly(name, getattr(os, name)))


def killed(prompts: Path, results: Path, call: int) -> bool:
    """Whether a run of the job was killed before that call; False where it has fewer."""
    child = os.fork()
    if child == 0:
        kill_before(call)
        with opened(prompts, results) as journal:
            finish(journal, prompts, each=2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
    return os.WIFSIGNALED(status)


def look(prompts: Path, results: Path) -> None:
    """The job can be completed."""
    with opened(prompts, results) as journal:
        finish(journal, prompts)
    assert answers(results).keys() == ALL
    assert len(Path(f"{results}.errors").read_bytes().splitlines()) == 1
    assert not Path(f"{results}.job.new").exists()


def main(folder: Path) -> None:
    os.fsync = lambda fd: None  # a killed process loses nothing that the system has: only the order matters here
    prompts = write_rows(folder / "prompts", ROWS)
    for call in range(1000):
        results = folder / f"results{call}"
        was_killed = killed(prompts, results, call)
        killed(prompts, results, call // 2)  # and once more, while it goes on
        look(prompts, results)
        if not was_killed:
            print(call)
            return


def loop(prompts: Path, results: Path) -> None:
    with opened(prompts, results) as journal, PromptFile(prompts, DEFAULTS) as file:
        for row in file.rows(journal.is_done):
            assert not isinstance(row, BadRow)
            for index in journal.missing(row):
                journal.add(row, text_of(row, index))
                journal.commit()
                print(index, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "loop":
        loop(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
