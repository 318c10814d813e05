"""The loop of a job: rows go in, passes over the weights are made for all that are under way, and texts come out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from tierstore.batch_schedule import Limits, Part, admit, next_pass, page_keys, too_long
from tierstore.errors import CapacityError, PageLostError, RowError
from tierstore.hf.batch.slices import Capacity, Slice
from tierstore.jobs.drafts import Drafting
from tierstore.jobs.encoding import Encoder
from tierstore.jobs.ending import Ending
from tierstore.jobs.rows import BadRow, Row
from tierstore.jobs.samples import Failed, Finished, Prompt, Request, Sample, seed_of

if TYPE_CHECKING:
    from torch import Tensor

MOST_TRIES = 3
"""How often a row starts anew because its pages were lost, before the job gives up."""

MOST_AT_ONCE = 1000
"""Rows that fail between two passes: more of them wait until these are written."""


class Model(Protocol):
    """What a job computes with: ``hf.batch.tokens.TokenModel``, or what does the same in another way."""

    @property
    def capacity(self) -> Capacity: ...
    def add(self, tokens: Sequence[int]) -> tuple[int, int]: ...
    def fork(self, sequence: int) -> int: ...
    def crop(self, sequence: int, length: int) -> None: ...
    def seal(self, sequence: int, tokens: Sequence[int]) -> None: ...
    def remove(self, sequence: int) -> None: ...
    def step(self, slices: Sequence[Slice]) -> list[Tensor]: ...
    def losing(self, error: PageLostError) -> Sequence[int]: ...


@dataclass(slots=True)
class Counts:
    """What was done so far. ``prompt_tokens`` were computed, ``found_tokens`` of prompts were there already;
    ``drafted_tokens`` were tried, and ``accepted_tokens`` of them were right."""

    passes: int = 0
    prompt_tokens: int = 0
    found_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Engine:
    """Answers rows with ``model``, for up to ``limits.sequences`` texts at once.

    ``ends`` are the end tokens, ``positions`` how many tokens the model can take, None for any number, and ``seed`` is
    that of rows without one. ``enough`` says which budget has room for a text of so many tokens. ``counts`` may be read
    at any time. The model keeps what is under way when a job is left in the middle: close it.
    """

    def __init__(
        self,
        model: Model,
        encoder: Encoder,
        *,
        limits: Limits,
        ends: Collection[int],
        positions: int | None,
        seed: int,
        drafting: Drafting | None = None,
        shares: bool = True,
        enough: Callable[[int], str] = lambda tokens: "",
    ) -> None:
        self.counts = Counts()
        self._model, self._encoder, self._limits = model, encoder, limits
        self._ends, self._positions, self._seed = frozenset(ends), positions, seed
        self._drafting = drafting
        self._shares = shares
        self._enough = enough
        self._number = 0
        self._waiting: dict[int, Request] = {}
        self._prompts: dict[int, Prompt] = {}
        self._samples: dict[int, Sample] = {}
        self._out: list[Finished | Failed] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting, under way or to be told, so that the next row is all there is to do."""
        return not (self._waiting or self._prompts or self._samples or self._out)

    def answer(
        self, rows: Iterable[Row | BadRow | None], left: Callable[[Row], Sequence[int]] | None = None
    ) -> Iterator[list[Finished | Failed]]:
        """Texts that are finished, and rows that failed, in any order: a list, perhaps empty, after each pass.

        Rows are taken as they are needed; None among them says that no more are there yet, and should not be given
        while ``idle``. ``left`` says which samples of a row are wanted, None all of them. Raises what the model raises,
        except where that concerns single rows."""
        source = iter(rows)
        while True:
            self._take(source, left or _all)
            self._admit()
            if self._prompts or self._samples:
                self._pass()
            elif not self._waiting and not self._out:
                return
            out, self._out = self._out, []
            yield out

    def _take(self, source: Iterator[Row | BadRow | None], left: Callable[[Row], Sequence[int]]) -> None:
        """Read so far ahead that the scheduler has a choice."""
        most = 2 * self._limits.sequences
        while len(self._waiting) < most and len(self._out) < MOST_AT_ONCE and (row := next(source, None)) is not None:
            if isinstance(row, BadRow):
                self._out.append(Failed(row, row.reason))
                continue
            try:
                request = self._request(row, left(row))
            except RowError as error:
                self._out.append(Failed(row, str(error)))
                continue
            if request.waiting:
                self._waiting[request.number] = request

    def _request(self, row: Row, samples: Sequence[int]) -> Request:
        prompt = self._encoder.tokens(row.prompt, row.messages)
        new = row.sampling.max_new_tokens
        if self._positions is not None and len(prompt) + new > self._positions:
            raise RowError(
                f"a prompt of {len(prompt)} tokens and {new} new ones are {len(prompt) + new}, and the model has "
                f"{self._positions} positions: shorten the prompt, or lower max_new_tokens"
            )
        keys = page_keys(prompt, self._limits.page_tokens) if self._shares else ()
        stop, ends = self._encoder.stops(row.sampling.stop)
        if not row.sampling.ignore_eos:
            ends |= self._ends
        self._number += 1
        request = Request(row, self._number, prompt, seed_of(row, self._seed), list(samples), keys, stop, ends)
        if (sizes := too_long(request.as_waiting(), self._limits)) is not None:
            raise RowError(
                f"a prompt of {len(prompt)} tokens and {new} new ones need KV pages for {sizes[0]} tokens, and there "
                f"are pages for {sizes[1]}: shorten the prompt, lower max_new_tokens, or give the KV cache more bytes"
                f"{self._enough(sizes[0])}"
            )
        return request

    def _admit(self) -> None:
        if not self._waiting or len(self._samples) >= self._limits.sequences:
            return
        running = [each.as_running() for each in self._under_way()]
        for joins in admit(running, (each.as_waiting() for each in self._waiting.values()), self._limits):
            request = self._waiting[joins.row]
            sequence, found = self._model.add(request.prompt)
            if found < joins.found:  # pages are gone that it was to share
                self._model.remove(sequence)
                request.keys = ()
                continue
            self.counts.found_tokens += found
            indexes, request.waiting = request.waiting[: joins.samples], request.waiting[joins.samples :]
            self._prompts[sequence] = Prompt(request, sequence, found, tuple(indexes))
            if not request.waiting:
                del self._waiting[joins.row]

    def _pass(self) -> None:
        if self._drafting is not None:
            missing = sum(len(each.request.prompt) - each.length for each in self._prompts.values())
            self._drafting.propose(self._samples.values(), missing)
        running = [each.as_running() for each in self._under_way()]
        parts = next_pass(running, self._limits)
        slices = [self._slice(part) for part in parts]
        try:
            logits = self._model.step(slices)
        except PageLostError as error:
            self._start_losers_anew(error)
            return
        except CapacityError as error:
            self._make_room(error)
            return
        self.counts.passes += 1
        for each, rows in zip(slices, logits, strict=True):
            at = (self._prompts if each.prompt else self._samples).get(each.sequence)
            if at is None:
                continue  # another sample of its row has failed just now
            try:
                if isinstance(at, Prompt):
                    self._computed(at, each, rows)
                else:
                    self._generated(at, each, rows)
            except RowError as error:
                self._fail(at.request, str(error))

    def _slice(self, part: Part) -> Slice:
        if not part.prompt:
            sample = self._samples[part.sequence]
            tokens = (sample.tokens[-1], *sample.drafted[: part.tokens - 1])
            return Slice(part.sequence, tokens, len(tokens), False)
        at = self._prompts[part.sequence]
        tokens = at.request.prompt[at.length : at.length + part.tokens]
        return Slice(part.sequence, tokens, int(at.length + part.tokens == len(at.request.prompt)), True)

    def _computed(self, at: Prompt, done: Slice, logits: Tensor) -> None:
        """More of a prompt is there; where it is all there, its texts begin."""
        at.length += len(done.tokens)
        self.counts.prompt_tokens += len(done.tokens)
        self._model.seal(at.sequence, at.request.prompt[: at.length])
        if at.length < len(at.request.prompt):
            return
        going_on = []
        for index in at.indexes:
            sample = Sample(at.request, index, self._ending(at.request))
            sample.take(logits)
            self.counts.generated_tokens += 1
            if sample.reason:
                self._out.append(sample.finished())
            else:
                going_on.append(sample)
        del self._prompts[at.sequence]
        if not going_on:
            self._model.remove(at.sequence)
        for number, sample in enumerate(going_on):
            sample.sequence = self._model.fork(at.sequence) if number else at.sequence
            self._samples[sample.sequence] = sample

    def _generated(self, sample: Sample, done: Slice, logits: Tensor) -> None:
        """One more token, and those drafted ones that were right."""
        drafted = done.tokens[1:]
        before = len(sample.tokens)
        sample.take(logits, drafted)
        taken = len(sample.tokens) - before
        self.counts.generated_tokens += taken
        self.counts.drafted_tokens += len(drafted)
        self.counts.accepted_tokens += taken - 1
        if self._drafting is not None:
            self._drafting.tried(sample, len(drafted), taken - 1)
        if sample.reason:
            self._leave(sample)
            self._out.append(sample.finished())
        elif taken <= len(drafted):
            self._model.crop(sample.sequence, sample.length)

    def _under_way(self) -> list[Sample | Prompt]:
        return [*self._samples.values(), *self._prompts.values()]

    def _leave(self, each: Sample | Prompt) -> None:
        self._model.remove(each.sequence)
        self._samples.pop(each.sequence, None)
        self._prompts.pop(each.sequence, None)
        if self._drafting is not None:
            self._drafting.forget(each.sequence)

    def _fail(self, request: Request, reason: str) -> None:
        """None of its texts that have not come will come."""
        for each in self._under_way():
            if each.request is request:
                self._leave(each)
        self._waiting.pop(request.number, None)
        self._out.append(Failed(request.row, reason))

    def _start_losers_anew(self, error: PageLostError) -> None:
        """Whose pages are lost starts from its prompt, and says the same again."""
        losing = set(self._model.losing(error))
        requests = {self._start_anew(each) for each in self._under_way() if each.sequence in losing or not losing}
        for request in requests:
            request.tries += 1
            if request.tries > MOST_TRIES:
                raise error

    def _make_room(self, error: CapacityError) -> None:
        """There was less room than was counted on: the newest sequence starts anew when others are done."""
        everybody = self._under_way()
        newest = max(everybody, key=lambda each: each.request.number)
        if len(everybody) == 1:
            prompt, sampling = newest.request.prompt, newest.request.row.sampling
            more = self._enough(len(prompt) + sampling.max_new_tokens) if error.of_pages else ""
            self._fail(newest.request, f"{error}{more}")
            return
        self._limits = replace(self._limits, sequences=max(1, min(self._limits.sequences, len(everybody)) - 1))
        self._start_anew(newest)

    def _start_anew(self, each: Sample | Prompt) -> Request:
        """Its samples wait again, in the row's place."""
        self._leave(each)
        request = each.request
        indexes = [each.index] if isinstance(each, Sample) else each.indexes
        request.waiting = sorted({*request.waiting, *indexes})
        self._waiting = dict(sorted({**self._waiting, request.number: request}.items()))
        return request

    def _ending(self, request: Request) -> Ending:
        most = request.row.sampling.max_new_tokens
        return Ending(self._encoder.decode, ends=request.ends, stop=request.stop, most=most)


def _all(row: Row) -> Sequence[int]:
    return range(row.sampling.n)
