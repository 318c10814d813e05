"""Which tokens may come next, looked up in the text so far, and how many of them are worth trying in a pass.

Prompt lookup (Saxena 2023) copies what followed where the text went on in the same way before. How many drafted tokens
pay is decided as in speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): each is right with some likelihood
if those before it are, a pass takes longer by those that do not fit what it has room for anyway, and a model that
drafts takes time of its own.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

__all__ = ["BY_MODEL", "DraftLength", "Lookup", "Offer", "PassCost"]

LONGEST = 3
"""Tokens that must be the same, at most, for what followed them to be looked up. 1 at least."""

BY_MODEL = 0
"""The kind of drafts that a model makes, one token of every text in a step. Those of other kinds take no time."""

PRIOR, PRIOR_BY_MODEL = 0.4, 0.7
"""How likely a drafted token is right, before any was tried."""
PRIOR_TOKENS = 8.0
"""What is believed of a text from the others counts as much as so many tokens that were tried in it."""
KEPT_OF_KIND, KEPT_OF_TEXT = 0.998, 0.96
"""What is known weighs so much less with every token that is tried: of all drafts of a kind, and of those in a text."""
PROBING, PROBED_TOKENS = 1 / 64, 4
"""So much of the time, at most, goes to drafts of a model that seem not to pay, so as to see when they do; so many
tokens each time."""

_TOKEN_BITS = 32


class Lookup:
    """The tokens of one text, and where each run of up to ``LONGEST`` of them was last. All token ids are in
    [0, 2**32). A token takes constant time and memory."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("I")
        self._after: list[dict[int, int]] = [{} for _ in range(LONGEST)]
        self._ends = [-1] * LONGEST
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with ``tokens``. Raises ``OverflowError`` for what is no token id."""
        for token in tokens:
            place = len(self._tokens)
            self._tokens.append(token)
            before = 0
            for n, after in enumerate(self._after):
                end, run = self._ends[n], (before << _TOKEN_BITS) | token
                if end >= 0:
                    after[end] = place  # known from now on, when something follows it
                before, self._ends[n] = end, run if place >= n else -1

    @property
    def run(self) -> int:
        """How many tokens, at most ``LONGEST``, the text ends with that it had before: the more, the better a draft.
        0 where there is none."""
        return next((n for n in range(LONGEST, 0, -1) if self._ends[n - 1] in self._after[n - 1]), 0)

    def draft(self, most: int) -> list[int]:
        """``most`` tokens that followed where the longest run that the text ends with was last, or none.

        Where the text ends before there are as many, it goes on as drafted: a text that repeats itself does so."""
        if (run := self.run) == 0:
            return []
        place = self._after[run - 1][self._ends[run - 1]]
        period = len(self._tokens) - place
        return [self._tokens[place + i % period] for i in range(most)]


@dataclass(frozen=True, slots=True)
class PassCost:
    """What a pass takes: it has up to ``micro_batches`` of ``tokens`` tokens, each of which, full or not, computes for
    ``compute_seconds``; beside that weights are brought for ``transfer_seconds``; ``overhead_seconds`` come on top.
    A model that drafts takes ``step_seconds`` for each of its steps. Raises ``ValueError``."""

    tokens: int
    micro_batches: int
    compute_seconds: float
    transfer_seconds: float
    overhead_seconds: float = 0.0
    step_seconds: float = 0.0

    def __post_init__(self) -> None:
        times = (self.compute_seconds, self.transfer_seconds, self.overhead_seconds, self.step_seconds)
        if min(self.tokens, self.micro_batches) < 1 or not all(isfinite(t) and t >= 0 for t in times):
            raise ValueError(f"{self}: sizes are at least 1, and seconds finite and not negative")
        if self.compute_seconds + self.transfer_seconds + self.overhead_seconds == 0:
            raise ValueError(f"{self}: a pass takes time")

    def seconds(self, tokens: int, steps: int = 0) -> float:
        """Of a pass over ``tokens`` tokens, drafted ones included, after ``steps`` steps of a model that drafts."""
        computing = -(-tokens // self.tokens) * self.compute_seconds
        return self.overhead_seconds + max(self.transfer_seconds, computing) + steps * self.step_seconds


@dataclass(frozen=True, slots=True)
class Offer:
    """``tokens`` that could be drafted for a text, or are to be. ``kind`` is ``BY_MODEL``, or of looked-up ones
    ``Lookup.run``. ``begin_seconds`` pass before the first."""

    tokens: int
    kind: int
    begin_seconds: float = 0.0


class DraftLength:
    """How many tokens to draft for each text of a batch: those with which the most tokens per second are expected.
    Learns by what was right. Texts are known by the numbers of their sequences.

    Drafts of one kind are taken to be about as good in all texts, until one of these shows that it is different."""

    def __init__(self) -> None:
        self._of_kind: dict[int, _Seen] = {}
        self._of_text: dict[int, dict[int, _Seen]] = {}  # by sequence and kind
        self._unspent = 0.0

    def observe(self, sequence: int, kind: int, drafted: int, accepted: int) -> None:
        """Of ``drafted`` tokens for ``sequence`` the first ``accepted`` were right, whether they were tried or not."""
        if not 0 <= accepted <= drafted:
            raise ValueError(f"{accepted} of {drafted} drafted tokens were accepted: need 0 <= accepted <= drafted")
        tried = min(accepted + 1, drafted)  # what stood behind a wrong one says nothing
        self._of_kind.setdefault(kind, _prior(kind)).observe(accepted, tried, KEPT_OF_KIND)
        seen = self._of_text.setdefault(sequence, {}).setdefault(kind, _Seen(0.0, 0.0))
        seen.observe(accepted, tried, KEPT_OF_TEXT)

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown, is gone."""
        self._of_text.pop(sequence, None)

    def acceptance(self, sequence: int, kind: int) -> float:
        """How likely a drafted token is right, if those before it are; above 0 and below 1."""
        of_kind = self._of_kind.get(kind) or _prior(kind)
        seen = self._of_text.get(sequence, {}).get(kind) or _Seen(0.0, 0.0)
        return (seen.right + PRIOR_TOKENS * of_kind.right / of_kind.tried) / (seen.tried + PRIOR_TOKENS)

    def decide(self, cost: PassCost, tokens: int, offers: Mapping[int, Sequence[Offer]]) -> dict[int, Offer]:
        """For each sequence which one of its ``offers`` to take, and how many tokens of it; none for those left out.

        ``tokens`` are in the pass anyway, of prompts too. All fit into the pass. Nothing is taken that would not make
        it worth its longer time, but for a few tokens of a model now and then: what is not tried is not known."""
        if tokens < 1:
            return {}
        free, likeliest = dict[int, Offer](), dict[int, Offer]()
        for sequence, theirs in offers.items():
            for offer in sorted(theirs, key=lambda offer: self.acceptance(sequence, offer.kind)):
                likeliest[sequence] = offer
                if offer.kind != BY_MODEL:
                    free[sequence] = offer
        choices = [free] if free == likeliest else [free, likeliest]
        taken = max((self._best(cost, tokens, each) for each in choices), key=lambda found: found[0])[1]
        drafting = {sequence for sequence, offer in taken.items() if offer.kind == BY_MODEL}
        if not drafting:
            taken |= self._probe(cost, tokens, offers, taken)
        for sequence, seen in self._of_text.items():
            if sequence in offers and sequence not in drafting and BY_MODEL in seen:
                seen[BY_MODEL].fade(KEPT_OF_TEXT)  # until it is like the others, and tried again if they are
        return taken

    def _best(self, cost: PassCost, tokens: int, offers: Mapping[int, Offer]) -> tuple[float, dict[int, Offer]]:
        """The most tokens per second that ``offers`` can make, and what is to be taken of them for that; of equals the
        fewest."""
        gains: list[tuple[float, int, int]] = []
        for sequence, offer in offers.items():
            acceptance, gain = self.acceptance(sequence, offer.kind), 1.0
            for nth in range(1, offer.tokens + 1):
                gain *= acceptance
                gains.append((-gain, nth, sequence))
        gains = sorted(gains)[: max(cost.tokens * cost.micro_batches - tokens, 0)]
        best, rate, useful, steps, begin = 0, tokens / cost.seconds(tokens), float(tokens), 0, 0.0
        for number, (gain, nth, sequence) in enumerate(gains, 1):
            useful -= gain
            if offers[sequence].kind == BY_MODEL:
                steps = max(steps, nth)
                begin += offers[sequence].begin_seconds if nth == 1 else 0.0
            now = useful / (cost.seconds(tokens + number, steps) + begin)
            if now > rate:
                best, rate = number, now
        lengths = Counter(sequence for _, _, sequence in gains[:best])
        return rate, {sequence: replace(offers[sequence], tokens=length) for sequence, length in lengths.items()}

    def _gain(self, sequence: int, offer: Offer) -> float:
        """How many tokens of an offer are expected to be right."""
        acceptance = self.acceptance(sequence, offer.kind)
        return sum(acceptance**nth for nth in range(1, offer.tokens + 1))

    def _probe(
        self, cost: PassCost, tokens: int, offers: Mapping[int, Sequence[Offer]], taken: Mapping[int, Offer]
    ) -> dict[int, Offer]:
        """A few tokens of a model for a text that is ready, once as much time has passed as makes them cheap. They come
        instead of what is ``taken`` of that text, which costs time as well."""
        by_model = [(each, s) for s, theirs in offers.items() for each in theirs if each.kind == BY_MODEL]
        placed = tokens + sum(offer.tokens for offer in taken.values())
        room = cost.tokens * cost.micro_batches - placed
        if not by_model or room < 1:
            return {}
        offer, sequence = min(by_model, key=lambda found: (found[0].begin_seconds, found[1]))
        offer = replace(offer, tokens=min(offer.tokens, PROBED_TOKENS, room))
        without = cost.seconds(placed)
        extra = cost.seconds(placed + offer.tokens, offer.tokens) + offer.begin_seconds - without
        if sequence in taken:
            lost = self._gain(sequence, taken[sequence]) - self._gain(sequence, offer)
            extra += max(lost, 0.0) * without / (tokens + sum(self._gain(s, each) for s, each in taken.items()))
        self._unspent += PROBING * without
        if self._unspent < extra:
            return {}
        self._unspent = 0.0
        return {sequence: offer}


@dataclass(slots=True)
class _Seen:
    """Tokens that were drafted, and those of them that were right, the latest counting most."""

    right: float
    tried: float

    def observe(self, right: int, tried: int, kept: float) -> None:
        self.fade(kept**tried)
        self.right, self.tried = self.right + right, self.tried + tried

    def fade(self, kept: float) -> None:
        self.right, self.tried = self.right * kept, self.tried * kept


def _prior(kind: int) -> _Seen:
    prior = PRIOR_BY_MODEL if kind == BY_MODEL else PRIOR
    return _Seen(prior * PRIOR_TOKENS, PRIOR_TOKENS)
