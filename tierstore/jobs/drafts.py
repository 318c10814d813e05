"""Tokens that may come next are tried beside the one that does: who suggests them, and how many are worth it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tierstore.drafting import BY_MODEL, DraftLength, Lookup, Offer, PassCost
from tierstore.jobs.samples import Sample

if TYPE_CHECKING:
    from tierstore.hf.batch.draft import DraftModel

MOST = 16
"""Tokens that are drafted at once for a text: hardly ever are so many right."""

SHARE_OF_TEXT = 4
"""What a draft model needs to begin with a text is spread over as many passes as one in so many of the tokens left."""


class LookupDrafter:
    """Suggests what followed earlier in the prompt or the text. That takes no time, so that what it would have
    suggested is compared with what came, whether it was tried or not."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[Lookup, int]] = {}

    def offer(self, sample: Sample, most: int) -> Offer | None:
        """``most`` tokens or none, for ``sample`` as it is now."""
        lookup, known = self._texts.get(sample.sequence) or (Lookup(sample.request.prompt), 0)
        lookup.extend(sample.tokens[known:])
        self._texts[sample.sequence] = lookup, len(sample.tokens)
        return Offer(most, lookup.run) if lookup.run else None

    def draft(self, sample: Sample, most: int) -> list[int]:
        """What it offered just now."""
        return self._texts[sample.sequence][0].draft(most)

    def compare(self, sample: Sample) -> tuple[Offer, int] | None:
        """What could have been tried instead of all tokens that came since the last offer, and how many were right."""
        lookup, known = self._texts.get(sample.sequence) or (Lookup(), 0)
        came = sample.tokens[known:]
        if not lookup.run or not came:
            return None
        return Offer(len(came), lookup.run), _right(lookup.draft(len(came)), came)

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown, is gone."""
        self._texts.pop(sequence, None)


class ModelDrafter:
    """Suggests what ``model`` takes for likely, with the settings and the random numbers of each text."""

    def __init__(self, model: DraftModel) -> None:
        self._model = model

    @property
    def step_seconds(self) -> float:
        """Of a step, in which each text gets a token."""
        return self._model.step_seconds

    def offer(self, sample: Sample, most: int) -> Offer | None:
        """Up to ``most`` tokens, where there is room for ``sample``."""
        seconds = self._model.begin_seconds(sample.sequence, sample.length + 1)
        if seconds is None:
            return None
        left = sample.request.row.sampling.max_new_tokens - len(sample.tokens)
        return Offer(most, BY_MODEL, seconds / max(left // SHARE_OF_TEXT, 1))

    def draft(self, wanted: Mapping[Sample, int]) -> Mapping[Sample, list[int]]:
        """Up to so many tokens for each of ``wanted``, as they are now; all in the same steps."""
        from tierstore.hf.batch.draft import DraftText

        texts = [
            DraftText(sample.sequence, (*sample.request.prompt, *sample.tokens), most, sample.choose)
            for sample, most in wanted.items()
        ]
        return dict(zip(wanted, self._model.draft(texts), strict=True))

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown, is gone."""
        self._model.forget(sequence)


class Drafting:
    """Suggests tokens that fit into a pass, looked up or by a ``model``: as many as pay by ``cost``, or with ``always``
    all that were looked up.

    They change no text: those that the large model would not have chosen are dropped."""

    def __init__(self, cost: PassCost, *, always: bool = False, model: ModelDrafter | None = None) -> None:
        self._cost, self._always, self._model = cost, always, model
        self._lookup = LookupDrafter()
        self._length = DraftLength()
        self._by_model: set[int] = set()

    def propose(self, samples: Collection[Sample], prompt_tokens: int) -> None:
        """Set ``drafted`` of ``samples``, which go on in the next pass, as room is beside ``prompt_tokens``."""
        self._by_model.clear()
        room = self._cost.tokens * self._cost.micro_batches - len(samples) - prompt_tokens
        offers: dict[int, list[Offer]] = {}
        for sample in samples:
            sample.drafted = []
            most = min(sample.request.row.sampling.max_new_tokens - len(sample.tokens) - 1, room, MOST)
            found = [self._lookup.offer(sample, most)]  # also where none is wanted: it is compared later
            if self._model is not None and most > 0:
                found.append(self._model.offer(sample, most))
            if most > 0 and (there := [offer for offer in found if offer is not None]):
                offers[sample.sequence] = there  # one token comes without drafts
        if not offers:
            return
        if self._always:
            taken = {sequence: theirs[0] for sequence, theirs in offers.items()}
        else:
            taken = self._length.decide(self._now(), len(samples) + prompt_tokens, offers)
        by_model: dict[Sample, int] = {}
        for sample in samples:
            offer = taken.get(sample.sequence)
            if offer is not None and offer.kind == BY_MODEL:
                by_model[sample] = offer.tokens
            elif offer is not None:
                sample.drafted = self._lookup.draft(sample, offer.tokens)
        if self._model is not None and by_model:
            for sample, drafted in self._model.draft(by_model).items():
                sample.drafted = drafted
                self._by_model.add(sample.sequence)

    def tried(self, sample: Sample, drafted: int, accepted: int) -> None:
        """``sample`` has gone on: so many of its drafted tokens were tried, and so many taken. Where it has ended, what
        was drafted beyond is neither right nor wrong."""
        if drafted and sample.sequence in self._by_model:
            came = sample.tokens[-1 - accepted :][:drafted]
            self._length.observe(sample.sequence, BY_MODEL, len(came), _right(sample.drafted, came))
        if (compared := self._lookup.compare(sample)) is not None:
            offer, right = compared
            self._length.observe(sample.sequence, offer.kind, offer.tokens, right)

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown, is gone."""
        self._lookup.forget(sequence)
        self._length.forget(sequence)
        if self._model is not None:
            self._model.forget(sequence)

    def _now(self) -> PassCost:
        seconds = 0.0 if self._model is None else self._model.step_seconds
        return replace(self._cost, step_seconds=seconds)


def _right(suggested: Sequence[int], came: Sequence[int]) -> int:
    """How many tokens came as they were suggested, which are at least as many."""
    return next((at for at, token in enumerate(came) if token != suggested[at]), len(came))
