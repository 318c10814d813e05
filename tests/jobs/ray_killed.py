"""A program: runs a job on the Ray cluster at ADDRESS, and kills itself when some of it is written.

Usage: ``ray_killed.py ADDRESS PROMPTS RESULTS CHECKPOINT``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import ray

from tests.jobs.small import settings_of
from tierstore.jobs.progress import JobProgress
from tierstore.jobs.running import run

before: list[int] = []
"""Rows that were done at each report."""


def die(now: JobProgress) -> None:
    before.append(now.done_rows)
    if now.done_rows > before[0]:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    address, prompts, results, checkpoint = sys.argv[1:]
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    run(Path(prompts), Path(results), settings_of(Path(checkpoint)), engine="ray", workers=1, progress=die)
