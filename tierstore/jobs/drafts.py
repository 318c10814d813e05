"""Tokens that may come next are tried beside the one that does: who suggests them, and how many are worth it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

from tierstore.drafting import DraftLength, Lookup, PassCost
from tierstore.jobs.samples import Sample

MOST = 16
"""Tokens that are drafted at once for a text: hardly ever are so many right."""


class Drafter(Protocol):
    """Suggests what may come next. Texts are known by the numbers of their sequences."""

    def available(self, sample: Sample) -> int:
        """How many tokens it could suggest for ``sample``, as it is now."""
        ...

    def kind(self, sample: Sample) -> int:
        """Of what it would suggest for ``sample``: suggestions of a kind are about as good, whatever the text."""
        ...

    def draft(self, wanted: Mapping[Sample, int]) -> Mapping[Sample, list[int]]:
        """Up to so many tokens for each of ``wanted``, as they are now."""
        ...

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown, is gone."""
        ...


class LookupDrafter:
    """Suggests what followed earlier in the prompt or the text."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[Lookup, int]] = {}

    def available(self, sample: Sample) -> int:
        """All or none."""
        lookup, known = self._texts.get(sample.sequence) or (Lookup(sample.request.prompt), 0)
        lookup.extend(sample.tokens[known:])
        self._texts[sample.sequence] = lookup, len(sample.tokens)
        return MOST if lookup.run else 0

    def kind(self, sample: Sample) -> int:
        """How many tokens in a row were found, for a text whose ``available`` was asked for just now."""
        return self._texts[sample.sequence][0].run

    def draft(self, wanted: Mapping[Sample, int]) -> Mapping[Sample, list[int]]:
        """For texts whose ``available`` was asked for just now."""
        return {sample: self._texts[sample.sequence][0].draft(most) for sample, most in wanted.items()}

    def forget(self, sequence: int) -> None:
        """Idempotent."""
        self._texts.pop(sequence, None)


class Drafting:
    """Has ``drafter`` suggest tokens that fit into a pass, and, unless ``always``, as many as pay by ``cost``.

    They change no text: those that the model would not have chosen are dropped."""

    def __init__(
        self, drafter: Drafter, cost: PassCost, *, always: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._drafter, self._cost, self._always, self._clock = drafter, cost, always, clock
        self._length = DraftLength(MOST)

    def propose(self, samples: Collection[Sample], prompt_tokens: int) -> None:
        """Set ``drafted`` of ``samples``, which go on in the next pass, as room is beside ``prompt_tokens``."""
        able: dict[int, int] = {}
        kinds: dict[int, int] = {}
        for sample in samples:
            sample.drafted = []
            left = sample.request.row.sampling.max_new_tokens - len(sample.tokens) - 1  # one comes without drafts
            if left > 0 and (available := self._drafter.available(sample)):
                able[sample.sequence] = min(left, available)
                kinds[sample.sequence] = self._drafter.kind(sample)
        room = self._cost.tokens * self._cost.micro_batches - len(samples) - prompt_tokens
        if not able or room <= 0:
            return
        if not self._always:
            able = self._length.decide(self._cost, len(samples) + prompt_tokens, able, kinds)
        wanted = {sample: able[sample.sequence] for sample in samples if able.get(sample.sequence)}
        if not wanted:
            return
        began = self._clock()
        for sample, drafted in self._drafter.draft(wanted).items():
            sample.drafted = drafted
        each = (self._clock() - began) / sum(wanted.values())
        self._cost = replace(self._cost, draft_seconds=0.9 * self._cost.draft_seconds + 0.1 * each)

    def tried(self, sample: Sample, drafted: int, accepted: int) -> None:
        """So many of the tokens drafted for ``sample`` were tried, and so many were right."""
        if drafted:
            self._length.observe(sample.sequence, drafted, accepted)

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown, is gone."""
        self._drafter.forget(sequence)
        self._length.forget(sequence)
