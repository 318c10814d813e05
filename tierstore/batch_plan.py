"""Chooses how many tokens a micro-batch has, how many micro-batches a pass, and how many sequences go on at once.

One pass over the weights serves all tokens in it, so a pass that streams should have as many as compute in the time
that the weights take: fewer waste the processor, and many more wait in memory for nothing. It is the throughput-bound
choice of FlexGen (Sheng et al. 2023, arXiv 2303.06865) for sequences that come and go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log

from tierstore.budget import format_nbytes
from tierstore.errors import PlanError
from tierstore.waiting_plan import WaitingPlan, WaitingRoom

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

NEAR = 1.05
"""A plan that takes so many times the seconds of the fastest is as good: what was measured is no more exact."""

SPARE = 1.5
"""So many times the sequences that fill a pass are under way, so that passes stay full while sequences come and go."""

STEP = 1.02
"""Passes are compared that are so many times as large as the one before."""


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
    become longer by ``new_tokens`` in the mean and by ``most_new_tokens`` at most.

    Tokens that many prompts begin with are computed once and should be left out of ``prompt_tokens``."""

    sequences: int
    prompt_tokens: float
    new_tokens: float
    most_new_tokens: int


@dataclass(frozen=True, slots=True)
class KvTier:
    """``pages`` of the KV cache rest here; each of them takes ``seconds_per_page`` in every pass that reads it."""

    pages: int
    seconds_per_page: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchRoom:
    """What memory allows, and whoever asked for at most ``sequences`` at once.

    ``open_pages`` pages of ``page_tokens`` tokens can be open at once, and there are those of ``kv``, the fastest tier
    first. ``activations`` bytes hold ``layer_nbytes_per_token`` of the micro-batch that is computed and
    ``waiting_nbytes_per_token`` of every other one of the pass; None is no bound. ``waiting`` is where micro-batches
    wait, None where they wait in the memory that they compute in. A sequence holds ``sequence_pages`` at most, however
    long it is; None is no bound."""

    page_tokens: int
    open_pages: int
    kv: Sequence[KvTier]
    layer_nbytes_per_token: int = 0
    waiting_nbytes_per_token: int = 0
    activations: int | None = None
    sequences: int | None = None
    waiting: WaitingRoom | None = None
    sequence_pages: int | None = None

    @property
    def pages(self) -> int:
        """Pages of all tiers."""
        return sum(tier.pages for tier in self.kv)

    def held(self, tokens: float) -> float:
        """Pages, and parts of one, of a sequence of so many tokens."""
        pages = tokens / self.page_tokens
        return pages if self.sequence_pages is None else min(pages, self.sequence_pages)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A pass has up to ``micro_batches`` of ``tokens`` tokens, for up to ``sequences`` sequences.

    ``seconds_per_pass`` is a pass in the steady state, in which the processor computes for ``compute_seconds`` and
    links are busy with weights and KV for ``transfer_seconds``; then ``tokens_per_second`` are generated. ``seconds``
    is the whole job; in the last ``tail_seconds`` few sequences are left. ``bound`` says what keeps the job from being
    faster: "compute", "transfer", "pages", "open pages", "sequences", "rows", "activations" or "hidden states";
    ``wanted`` sequences would be enough to compute for as long as the weights take. ``waiting`` says where
    micro-batches wait, None where they wait in the memory that they compute in.
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
    wanted: int
    waiting: WaitingPlan | None = None

    def explain(self) -> str:
        """What was chosen and why, in a few lines for people."""
        micro = "1 micro-batch" if self.micro_batches == 1 else f"up to {self.micro_batches} micro-batches"
        lines = [
            f"{self.sequences} sequences at once, in passes of {micro} of {self.tokens} tokens",
            f"  a pass takes about {self.seconds_per_pass:.4g} s, bound by {self.bound} "
            f"(alone: compute {self.compute_seconds:.4g} s, transfer {self.transfer_seconds:.4g} s)",
            f"  about {self.tokens_per_second:.4g} tokens a second are generated, the job takes about "
            f"{self.seconds:.4g} s",
            f"  {_REASONS[self.bound].format(wanted=self.wanted)}",
        ]
        if self.waiting is not None:
            lines.append(f"  {self.waiting.explain()}")
        if self.tail_seconds >= self.seconds / 20:
            lines.append(
                f"  few sequences are left in the last {self.tail_seconds:.4g} s: more rows in a job use them better"
            )
        return "\n".join(lines)


_WANTED = "{wanted} sequences would keep the processor busy"
_REASONS = {
    "compute": "the processor is never idle: more sequences would not be faster",
    "transfer": "more sequences bring as much KV as they gain: more of it in hbm, or fewer bytes of it, is faster",
    "pages": f"{_WANTED}, pages have no room for them: give the KV cache more bytes, or allow fewer new tokens",
    "open pages": f"{_WANTED}, fewer can have a page open: give the KV cache more bytes in hbm",
    "sequences": f"{_WANTED}: allow as many at once",
    "rows": f"{_WANTED}: a job of more rows takes hardly longer",
    "activations": f"{_WANTED}, hidden states of fewer fit: allow more bytes of activations",
    "hidden states": f"{_WANTED}, hidden states of fewer have room to wait: give the job more bytes of hbm or ram",
}


def build_batch_plan(costs: BatchCosts, job: BatchJob, room: BatchRoom) -> BatchPlan:
    """The fastest plan for ``job``, as a pure function of its arguments.

    ``tokens`` is one of ``costs.compute_seconds``: give a single one where it is decided already. Of those about as
    fast it is the smallest. Raises ``PlanError`` where ``activations`` do not hold one micro-batch, ``ValueError`` for
    numbers that cannot be.
    """
    _check(costs, job, room)
    fits = [n for n in sorted(costs.compute_seconds) if room.activations is None or _micro_batches(n, room)]
    if not fits:
        least = min(costs.compute_seconds)
        needed = least * room.layer_nbytes_per_token
        raise PlanError(
            f"a micro-batch of {least} tokens needs {format_nbytes(needed)} of activations, the budget has "
            f"{format_nbytes(room.activations or 0)}: raise Budget.activations to at least {needed} bytes",
            needed=needed,
        )
    plans = [_Sizes(tokens, costs, job, room).best() for tokens in fits]
    fastest = min(plan.seconds for plan in plans)
    return next(plan for plan in plans if plan.seconds <= NEAR * fastest)


def _check(costs: BatchCosts, job: BatchJob, room: BatchRoom) -> None:
    seconds = [*costs.compute_seconds.values(), *(tier.seconds_per_page for tier in room.kv)]
    if not costs.compute_seconds or min(costs.compute_seconds) < 1 or min(costs.compute_seconds.values()) <= 0:
        raise ValueError(f"{costs}: at least one size with the seconds that it computes is needed")
    if min(costs.transfer_seconds, costs.overhead_seconds, *seconds) < 0:
        raise ValueError(f"{costs}, {room}: seconds must not be negative")
    if job.sequences < 1 or min(job.prompt_tokens, job.new_tokens, job.most_new_tokens - job.new_tokens + 1) < 1:
        raise ValueError(f"{job}: a sequence and at least one token of its prompt and of its text are needed")
    if min(room.page_tokens, room.open_pages, 1 if room.sequences is None else room.sequences) < 1:
        raise ValueError(f"{room}: pages of at least one token are needed, an open one, and a sequence")


def _micro_batches(tokens: int, room: BatchRoom) -> int:
    """How many micro-batches ``room.activations`` hold."""
    left = (room.activations or 0) - tokens * room.layer_nbytes_per_token
    return 0 if left < 0 else 1 + left // max(tokens * room.waiting_nbytes_per_token, 1)


class _Sizes:
    """Plans with micro-batches of ``tokens`` tokens."""

    def __init__(self, tokens: int, costs: BatchCosts, job: BatchJob, room: BatchRoom) -> None:
        self._tokens, self._costs, self._job, self._room = tokens, costs, job, room
        self._micro_seconds = costs.compute_seconds[tokens]
        prompt, new, size = job.prompt_tokens, job.new_tokens, room.page_tokens
        # the pass that ends a prompt gives the first token, and the last one is never computed: in a pass, in the mean,
        self._tokens_each = (prompt + new - 1) / new
        open_each = 1 + prompt / new / size  # its last page, and those that its prompt is written to
        self._most = {
            "rows": job.sequences,
            "pages": max(1, room.pages // ceil(room.held(prompt + new))),
            "open pages": max(1, int(room.open_pages / open_each)),
        }
        if room.sequences is not None:
            self._most["sequences"] = room.sequences
        self._most_sequences = min(self._most.values())
        bounds = {} if room.activations is None else {"activations": _micro_batches(tokens, room)}
        if room.waiting is not None:
            bounds["hidden states"] = room.waiting.most(tokens)
        self._micro_bound = min(bounds, key=bounds.__getitem__, default="")
        self._most_micro_batches = bounds.get(self._micro_bound)

    def best(self) -> BatchPlan:
        """The fewest sequences that are about as fast as any number, and some to spare."""
        plans = [self._plan(micro_batches, self._filling(micro_batches)) for micro_batches in self._candidates()]
        best = min(plan.seconds for plan in plans)
        enough = next(plan for plan in plans if plan.seconds <= NEAR * best)
        sequences = min(self._most_sequences, ceil(SPARE * enough.sequences))
        # prompts may use what the weights take, also where too few sequences generate
        hidden = self._costs.transfer_seconds / self._micro_seconds
        filled = sequences * self._tokens_each / self._tokens
        more = self._at_most(ceil(hidden) if filled >= hidden else int(hidden))
        if self._room.waiting is not None:  # but for that nothing has to move
            more = min(more, self._room.waiting.on_device(self._tokens))
        micro_batches = max(enough.micro_batches, more)
        return self._plan(micro_batches, sequences)

    def _candidates(self) -> Iterator[int]:
        most = self._at_most(ceil(self._most_sequences * self._tokens_each / self._tokens))
        micro_batches = 1
        while micro_batches < most:
            yield micro_batches
            micro_batches = max(micro_batches + 1, int(micro_batches * STEP))
        yield most

    def _at_most(self, micro_batches: int) -> int:
        return micro_batches if self._most_micro_batches is None else min(micro_batches, self._most_micro_batches)

    def _filling(self, micro_batches: int) -> int:
        """The sequences that fill a pass."""
        return min(self._most_sequences, max(1, ceil(micro_batches * self._tokens / self._tokens_each)))

    def _plan(self, micro_batches: int, sequences: int) -> BatchPlan:
        job, tokens = self._job, micro_batches * self._tokens
        # in the steady state: as many as wait for nothing, or as a full pass has beside the prompts of those that come
        generated = min(sequences, tokens / self._tokens_each)
        used = max(ceil(generated / self._tokens), generated * self._tokens_each / self._tokens)
        compute, transfer = used * self._micro_seconds, self._transfer(sequences, used)
        seconds = self._pass(used, sequences)

        prompts = self._prompt_passes(generated, tokens)
        first = prompts * self._pass(micro_batches, sequences)
        turns = max(job.sequences / generated - 1, 0.0)
        if job.most_new_tokens == job.new_tokens and 4 * prompts <= job.new_tokens:
            turns = ceil(turns)  # sequences of one length come and leave together
        between = turns * job.new_tokens * seconds
        last = (job.new_tokens - 1) * self._pass(ceil(generated / self._tokens), sequences)
        tail = (job.most_new_tokens - job.new_tokens) * self._pass(1, 1)
        weights = ceil(self._costs.transfer_seconds / self._micro_seconds)
        return BatchPlan(
            tokens=self._tokens,
            micro_batches=micro_batches,
            sequences=sequences,
            seconds_per_pass=seconds,
            compute_seconds=compute,
            transfer_seconds=transfer,
            tokens_per_second=generated / seconds,
            tail_seconds=tail,
            seconds=first + between + last + tail,
            bound=self._bound(micro_batches, sequences, compute, transfer),
            wanted=ceil(weights * self._tokens / self._tokens_each),
            waiting=None if self._room.waiting is None else self._room.waiting.plan(micro_batches, self._tokens),
        )

    def _prompt_passes(self, sequences: float, tokens: int) -> int:
        """Passes of ``tokens`` until the first ``sequences`` have their prompts computed, beside those that generate
        already: of the tokens that these leave, each pass takes one part in ``prompt_tokens`` away."""
        left, prompt = 1 - sequences / tokens, self._job.prompt_tokens
        if prompt <= 1 or left <= 0:
            return ceil(sequences * prompt / tokens)
        return max(1, ceil(log(max(left, 1 / tokens)) / log(1 - 1 / prompt) - 1e-9))

    def _transfer(self, sequences: int, micro_batches: float) -> float:
        """Seconds in which weights, the KV of ``sequences`` in the middle of their lives, and what micro-batches hold
        that wait in host memory come over the links."""
        seconds = self._costs.transfer_seconds
        pages = sequences * self._room.held(self._job.prompt_tokens + self._job.new_tokens / 2)
        for tier in self._room.kv:
            here = min(pages, tier.pages)
            seconds += here * tier.seconds_per_page
            pages -= here
        waiting = self._room.waiting
        return seconds if waiting is None else seconds + waiting.seconds(ceil(micro_batches), self._tokens)

    def _pass(self, micro_batches: float, sequences: int) -> float:
        transfer = self._transfer(sequences, micro_batches)
        return max(micro_batches * self._micro_seconds, transfer) + self._costs.overhead_seconds

    def _bound(self, micro_batches: int, sequences: int, compute: float, transfer: float) -> str:
        if compute * NEAR >= transfer:
            return "compute"
        if sequences == self._most_sequences:
            return min(self._most, key=self._most.__getitem__)
        if micro_batches == self._most_micro_batches:
            return self._micro_bound
        if self._room.waiting is not None and micro_batches >= self._room.waiting.on_device(self._tokens):
            return "hidden states"
        return "transfer"
