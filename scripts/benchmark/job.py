"""What a child process is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass

PAUSE = "PAUSE"
"""Said by a child that waits until something else has been measured."""
FORK = "fork"
"""Tells ``benchmark.jobs`` to fork a process for each job that it reads."""
DONE = "DONE"
"""Said by it after each of them."""


@dataclass(frozen=True)
class Job:
    """``kind`` names a function of ``benchmark.jobs``; the rest are its numbers.

    ``hbm``: bytes of weights that may stand in memory. ``steps``: tokens to decode, or passes to run. Streaming jobs
    run ``groups`` of as many steps, with a pause around each. ``length``: tokens of the prompt. ``seconds``: how long
    the prefill that is looked for takes (0 for none), or how long passes are compared. ``form`` and ``out``: the packed
    format that is made of the checkpoint, and where. ``rows``: of a batch; ``kv_hbm``: bytes of its KV cache.
    """

    kind: str
    checkpoint: str
    threads: int
    hbm: int = 0
    steps: int = 4
    groups: int = 4
    length: int = 16
    seconds: float = 0.0
    form: str = ""
    out: str = ""
    rows: int = 1
    kv_hbm: int = 0
