"""A program: kills a job at random moments, then runs it to its end.

Usage: ``job_killed.py FOLDER CHECKPOINT KILLS``: does ``FOLDER/prompts.jsonl``, and prints how often it was killed.
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
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.jobs.small import settings_of
from tierstore.budget import Budget
from tierstore.hf.batch import support, tokens
from tierstore.hf.checkpoint import open_checkpoint
from tierstore.jobs.running import run

WARM = (support, tokens, open_checkpoint, AutoTokenizer, LlamaForCausalLM)
"""Imported here, and not by each child."""


def run_job(folder: Path, checkpoint: Path, *, passes: int | None) -> bool:
    """Whether another process did the job to its end: it is killed while it goes on after so many passes."""
    settings = settings_of(checkpoint, budget=Budget("64MiB"))
    heard, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        try:
            run(folder / "prompts.jsonl", folder / "results", settings, progress=lambda now: os.write(tells, b"."))
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
    random = Random(5)
    survived = [run_job(folder, checkpoint, passes=random.randint(1, 4)) for _ in range(kills)]
    assert run_job(folder, checkpoint, passes=None)
    print(survived.count(False), "times killed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
