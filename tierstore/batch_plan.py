"""Chooses how many tokens a micro-batch has, how many of them go through the weights in one pass, and for how many
sequences at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "CPU_TOKENS",
    "CUDA_TOKENS",
    "BatchCosts",
    "BatchJob",
    "BatchPlan",
    "BatchRoom",
    "KvTier",
    "build_batch_plan",
]

CPU_TOKENS = (8, 16, 32, 64, 128)
"""Tokens of a micro-batch to choose from on a CPU."""

CUDA_TOKENS = (32, 64, 128, 256, 512, 1024)
"""Tokens of a micro-batch to choose from on a GPU."""


@dataclass(frozen=True, slots=True)
class BatchCosts:
    """Measured seconds: ``compute_seconds`` of one micro-batch, by its tokens; ``transfer_seconds`` that the weights of
    a pass take over their slowest link, 0 where all stay; ``overhead_seconds`` of a pass that nothing hides."""

    compute_seconds: Mapping[int, float]
    transfer_seconds: float
    overhead_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchJob:
    """All that a job has to do: ``sequences`` (rows times samples) with prompts of ``prompt_tokens`` in the mean, which
    generate ``new_tokens`` in the mean, ``most_prompt_tokens`` and ``most_new_tokens`` at most."""

    sequences: int
    prompt_tokens: float
    new_tokens: float
    most_prompt_tokens: int
    most_new_tokens: int


@dataclass(frozen=True, slots=True)
class KvTier:
    """``pages`` of the KV cache rest here; each of them takes ``seconds_per_page`` in every pass that reads it."""

    pages: int
    seconds_per_page: float


@dataclass(frozen=True, slots=True)
class BatchRoom:
    """What memory allows: ``open_pages`` pages of ``page_tokens`` tokens open at once, and those of ``kv``, the fastest
    tier first. ``activations`` bytes hold ``layer_nbytes_per_token`` of the micro-batch that is computed and
    ``waiting_nbytes_per_token`` of every other one of the pass; None is no bound."""

    page_tokens: int
    open_pages: int
    kv: Sequence[KvTier]
    layer_nbytes_per_token: int = 0
    waiting_nbytes_per_token: int = 0
    activations: int | None = None


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A pass has up to ``micro_batches`` of ``tokens`` tokens, for up to ``sequences`` sequences.

    ``seconds_per_pass`` is a full one in the steady state, in which compute takes ``compute_seconds`` and
    ``transfer_seconds`` go to weights and KV; then ``tokens_per_second`` are generated. ``seconds`` is the whole job,
    of which ``tail_seconds`` are passes with few sequences left. ``bound`` says what keeps it from being faster:
    "compute", "transfer", "pages", "open pages", "rows" or "activations".
    """

    tokens: int
    micro_batches: int
    sequences: int
    seconds_per_pass: float
    compute_seconds: float
    transfer_seconds: float
    tokens_per_second: float
    tail_seconds: float
    seconds: float
    bound: str

    def explain(self) -> str:
        """What was chosen and why, in a few lines for people."""
        return ""


def build_batch_plan(costs: BatchCosts, job: BatchJob, room: BatchRoom) -> BatchPlan:
    """The fastest plan for ``job``, as a pure function of its arguments.

    ``tokens`` is one of ``costs.compute_seconds``: give a single one where it is decided already. Raises ``PlanError``
    where ``activations`` do not hold one micro-batch, ``ValueError`` for numbers that cannot be.
    """
    raise NotImplementedError
