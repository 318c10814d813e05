"""Rows that are being answered: what a row asks for, and each text that is being generated for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from tierstore.batch_schedule import Running, Waiting
from tierstore.hf.batch.choosing import Chooser
from tierstore.jobs.ending import Ending, Reason
from tierstore.jobs.rows import BadRow, Row

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Finished:
    """A text of ``row``, its sample number ``index`` from 0. ``tokens`` are the generated ones, an end token included;
    ``text`` is theirs, cut before a stop string. ``finish_reason`` is "stop" or "length"."""

    row: Row
    index: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: Reason
    prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A row that cannot be answered, and why: none of its texts will come that have not come."""

    row: Row | BadRow
    reason: str


@dataclass(slots=True, eq=False)
class Request:
    """A ``row`` to be answered, ``number`` among those of this run, whose ``prompt`` is tokens.

    ``waiting`` are the samples, by index, that have no sequence yet. ``keys`` stand for the prompt's pages, none where
    they are not to be shared. Its texts end before a string of ``stop`` and with a token of ``ends``. ``tries`` counts
    how often it had to start anew."""

    row: Row
    number: int
    prompt: tuple[int, ...]
    seed: int
    waiting: list[int]
    keys: tuple[bytes, ...]
    stop: tuple[str, ...]
    ends: frozenset[int]
    tries: int = 0

    def as_waiting(self) -> Waiting:
        """For the scheduler."""
        new_tokens = self.row.sampling.max_new_tokens
        return Waiting(self.number, len(self.prompt), new_tokens, len(self.waiting), self.keys)


@dataclass(slots=True, eq=False)
class Prompt:
    """A sequence that a prompt is computed in, up to ``length``, to be forked for the samples ``indexes``."""

    request: Request
    sequence: int
    length: int
    indexes: tuple[int, ...]

    def as_running(self) -> Running:
        """For the scheduler."""
        request, done = self.request, self.length
        prompt, new = len(request.prompt), request.row.sampling.max_new_tokens
        samples = len(self.indexes)
        return Running(self.sequence, request.number, prompt, new, done, samples, request.keys, sealed=done)


class Sample:
    """A text that is generated in ``sequence``, which has the prompt and all of ``tokens`` but the last one.

    ``drafted`` are tokens that may follow, to be tried in the next pass. ``reason`` says why it ended, once it has."""

    def __init__(self, request: Request, index: int, ending: Ending) -> None:
        self.request, self.index = request, index
        self.sequence = -1
        self.tokens: list[int] = []
        self.drafted: list[int] = []
        self.reason: Reason | None = None
        self._ending = ending
        self._chooser = Chooser(request.row.sampling, request.seed, index, request.prompt)

    @property
    def length(self) -> int:
        """Tokens of its sequence."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def as_running(self) -> Running:
        """For the scheduler."""
        request = self.request
        prompt, new = len(request.prompt), request.row.sampling.max_new_tokens
        drafts = len(self.drafted)
        return Running(
            self.sequence, request.number, prompt, new, self.length, keys=request.keys, sealed=prompt, drafts=drafts
        )

    def take(self, logits: Tensor, drafted: Sequence[int] = ()) -> None:
        """Go on by one token for each row of ``logits``, [1 + len(drafted), vocabulary], up to the first that was not
        drafted: what comes after that was computed for another text."""
        for number, row in enumerate(logits):
            token = self._chooser.choose(row, self.tokens)
            self.tokens.append(token)
            self.reason = self._ending.reason(self.tokens)
            if self.reason or number == len(drafted) or token != drafted[number]:
                return

    def choose(self, logits: Tensor, drafted: Sequence[int]) -> int:
        """The token that ``logits`` [vocabulary] would give it after ``drafted`` ones: it stays as it is."""
        return self._chooser.choose(logits, [*self.tokens, *drafted])

    def finished(self) -> Finished:
        """The result."""
        assert self.reason is not None, "it has ended"
        request, text = self.request, self._ending.text(self.tokens)
        return Finished(
            request.row, self.index, tuple(self.tokens), text, self.reason, len(request.prompt), request.seed
        )


def seed_of(row: Row, job_seed: int) -> int:
    """The row's own, or one of 53 bits, which every reader of JSON keeps, from the job's and the row's line."""
    if row.sampling.seed is not None:
        return row.sampling.seed
    digest = blake2b(f"{job_seed} {row.line}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 11
