"""Which tokens may come next, looked up in the text so far, and how many of them are worth trying in a pass.

Prompt lookup (Saxena 2023) copies what followed where the text went on in the same way before. How many drafted tokens
pay is decided as in speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): each is right with some likelihood
if those before it are, and a pass takes longer by those that do not fit what it has room for anyway.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite

__all__ = ["DraftLength", "Lookup", "PassCost"]

LONGEST = 3
"""Tokens that must be the same, at most, for what followed them to be looked up. 1 at least."""

PRIOR = 0.4
"""How likely a drafted token is right, before any was tried."""
PRIOR_TOKENS = 8.0
"""What is believed of a text from the others counts as much as so many tokens that were tried in it."""
KEPT_OF_KIND, KEPT_OF_TEXT = 0.998, 0.96
"""What is known weighs so much less with every token that is tried: of all drafts of a kind, and of those in a text."""
PROBING = 1 / 64
"""So much of the time, at most, goes to drafts that seem not to pay, so as to see when they do."""

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
    Each drafted token has taken ``draft_seconds``, 0 where it was looked up. Raises ``ValueError``."""

    tokens: int
    micro_batches: int
    compute_seconds: float
    transfer_seconds: float
    overhead_seconds: float = 0.0
    draft_seconds: float = 0.0

    def __post_init__(self) -> None:
        times = (self.compute_seconds, self.transfer_seconds, self.overhead_seconds, self.draft_seconds)
        if min(self.tokens, self.micro_batches) < 1 or not all(isfinite(t) and t >= 0 for t in times):
            raise ValueError(f"{self}: sizes are at least 1, and seconds finite and not negative")
        if self.compute_seconds + self.transfer_seconds + self.overhead_seconds == 0:
            raise ValueError(f"{self}: a pass takes time")

    def seconds(self, tokens: int, drafted: int = 0) -> float:
        """Of a pass over ``tokens`` tokens and the ``drafted`` ones."""
        computing = -(-(tokens + drafted) // self.tokens) * self.compute_seconds
        return self.overhead_seconds + max(self.transfer_seconds, computing) + drafted * self.draft_seconds


class DraftLength:
    """How many tokens to draft for each text of a batch, at most ``most``: those with which the most tokens per second
    are expected. Learns by what was accepted. Texts are known by the numbers of their sequences.

    Drafts of one kind, whatever the text, are taken to be about as good: with looked-up ones ``Lookup.run`` says much
    more than the text does."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of_kind: dict[int, _Seen] = {}
        self._of_text: dict[int, dict[int, _Seen]] = {}  # by sequence and kind
        self._kinds: dict[int, int] = {}  # of each sequence's latest drafts
        self._unspent = 0.0

    def observe(self, sequence: int, drafted: int, accepted: int) -> None:
        """Of ``drafted`` tokens that were tried for ``sequence`` the first ``accepted`` were right."""
        if not 0 <= accepted <= drafted:
            raise ValueError(f"{accepted} of {drafted} drafted tokens were accepted: need 0 <= accepted <= drafted")
        tried = min(accepted + 1, drafted)  # what stood behind a wrong one says nothing
        kind = self._kinds.get(sequence, 0)
        self._of_kind.setdefault(kind, _prior()).observe(accepted, tried, KEPT_OF_KIND)
        seen = self._of_text.setdefault(sequence, {}).setdefault(kind, _Seen(0.0, 0.0))
        seen.observe(accepted, tried, KEPT_OF_TEXT)

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown, is gone."""
        self._of_text.pop(sequence, None)
        self._kinds.pop(sequence, None)

    def acceptance(self, sequence: int) -> float:
        """How likely a token of its latest drafts is right, if those before it are; above 0 and below 1."""
        kind = self._kinds.get(sequence, 0)
        of_kind = self._of_kind.get(kind) or _prior()
        seen = self._of_text.get(sequence, {}).get(kind) or _Seen(0.0, 0.0)
        return (seen.right + PRIOR_TOKENS * of_kind.right / of_kind.tried) / (seen.tried + PRIOR_TOKENS)

    def decide(
        self, cost: PassCost, tokens: int, wanted: Mapping[int, int], kinds: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        """How many tokens to draft for each of the sequences ``wanted``, of which so many could be had.

        ``kinds`` are those of their drafts, 0 for the others. ``tokens`` are in the pass anyway, of prompts too. All
        fit into the pass. Those are none that would not make it worth its longer time, but for a few now and then: what
        is not tried is not known."""
        gains: list[tuple[float, int, int]] = []
        for sequence, most in wanted.items():
            self._kinds[sequence] = kinds.get(sequence, 0) if kinds else 0
            acceptance, gain = self.acceptance(sequence), 1.0
            for nth in range(min(most, self._most)):
                gain *= acceptance
                gains.append((-gain, nth, sequence))
        gains = sorted(gains)[: max(cost.tokens * cost.micro_batches - tokens, 0)]
        chosen = gains[: _best(cost, tokens, gains)] if tokens > 0 else []
        if gains and not chosen and tokens > 0:
            chosen = self._probe(cost, tokens, gains)
        lengths = dict.fromkeys(wanted, 0)
        for _, _, sequence in chosen:
            lengths[sequence] += 1
        for sequence, length in lengths.items():
            if length == 0 and (seen := self._of_text.get(sequence, {}).get(self._kinds[sequence])):
                seen.fade(KEPT_OF_TEXT)  # until it is like the others, and tried again if they are
        return lengths

    def _probe(self, cost: PassCost, tokens: int, gains: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
        """What fills one more micro-batch, once as much time has passed as makes it cheap."""
        filling = gains[: cost.tokens - tokens % cost.tokens]
        without = cost.seconds(tokens)
        extra = cost.seconds(tokens, len(filling)) - without
        self._unspent += PROBING * without
        if self._unspent < extra:
            return []
        self._unspent = 0.0
        return filling


@dataclass(slots=True)
class _Seen:
    """Tokens that were tried, and those of them that were right, the latest counting most."""

    right: float
    tried: float

    def observe(self, right: int, tried: int, kept: float) -> None:
        self.fade(kept**tried)
        self.right, self.tried = self.right + right, self.tried + tried

    def fade(self, kept: float) -> None:
        self.right, self.tried = self.right * kept, self.tried * kept


def _prior() -> _Seen:
    return _Seen(PRIOR * PRIOR_TOKENS, PRIOR_TOKENS)


def _best(cost: PassCost, tokens: int, gains: list[tuple[float, int, int]]) -> int:
    """How many of ``gains``, the highest first, make the most tokens per second; of equals the fewest."""
    best, rate, useful = 0, tokens / cost.seconds(tokens), float(tokens)
    for number, (gain, _, _) in enumerate(gains, 1):
        useful -= gain
        if useful / cost.seconds(tokens, number) > rate:
            best, rate = number, useful / cost.seconds(tokens, number)
    return best
