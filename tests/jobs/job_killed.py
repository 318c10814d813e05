"""A program: kills a job at random moments and runs it again until it is whole. Then it has said what one that nobody
killed says, each text once.

Usage: ``job_killed.py FOLDER CHECKPOINT KILLS``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers

from tests.jobs.small import FAILED, TEXTS, settings_of, texts_of, write_prompts
from tierstore.jobs.running import run


def run_job(prompts: Path, results: Path, checkpoint: Path, *, passes: int | None) -> bool:
    """Whether another process did the job to its end: it is killed while it goes on after so many passes."""
    heard, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        try:
            run(prompts, results, settings_of(checkpoint), progress=lambda now: os.write(tells, b"."))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    os.close(tells)
    seen = 0
    while os.read(heard, 1):
        seen += 1
        if seen == passes:
            os.kill(child, signal.SIGKILL)
            break
    os.close(heard)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
    return not os.WIFSIGNALED(status)


def main(folder: Path, checkpoint: Path, kills: int) -> None:
    prompts = write_prompts(folder)
    assert run_job(prompts, folder / "alone", checkpoint, passes=None)
    wanted = texts_of(folder / "alone")
    assert len(wanted) == TEXTS
    random = Random(5)
    results = folder / "killed"
    survived = [run_job(prompts, results, checkpoint, passes=random.randint(1, 6)) for _ in range(kills)]
    run_job(prompts, results, checkpoint, passes=None)
    assert texts_of(results) == wanted
    assert len((folder / "killed.errors").read_text().splitlines()) == FAILED
    print(survived.count(False), "times killed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
