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
KEPT_OF_ALL, KEPT_OF_ONE = 0.998, 0.96
"""What is known weighs so much less with every token that is tried: of all texts, and of one."""
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

    def draft(self, most: int) -> list[int]:
        """``most`` tokens that followed where the longest run that the text ends with was last, or none.

        Where the text ends before there are as many, it goes on as drafted: a text that repeats itself does so."""
        for after, end in zip(reversed(self._after), reversed(self._ends), strict=True):
            if (place := after.get(end)) is not None:
                period = len(self._tokens) - place
                return [self._tokens[place + i % period] for i in range(most)]
        return []


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
    are expected. Learns by what was accepted. Texts are known by the numbers of their sequences."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._all = _Seen(PRIOR * PRIOR_TOKENS, PRIOR_TOKENS)
        self._seen: dict[int, _Seen] = {}
        self._unspent = 0.0

    def observe(self, sequence: int, drafted: int, accepted: int) -> None:
        """Of ``drafted`` tokens that were tried for ``sequence`` the first ``accepted`` were right."""
        if not 0 <= accepted <= drafted:
            raise ValueError(f"{accepted} of {drafted} drafted tokens were accepted: need 0 <= accepted <= drafted")
        tried = min(accepted + 1, drafted)  # what stood behind a wrong one says nothing
        self._all.observe(accepted, tried, KEPT_OF_ALL)
        self._seen.setdefault(sequence, _Seen(0.0, 0.0)).observe(accepted, tried, KEPT_OF_ONE)

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown, is gone."""
        self._seen.pop(sequence, None)

    def acceptance(self, sequence: int) -> float:
        """How likely a drafted token is right, if those before it are; above 0 and below 1."""
        seen, prior = self._seen.get(sequence, _Seen(0.0, 0.0)), self._all.right / self._all.tried
        return (seen.right + PRIOR_TOKENS * prior) / (seen.tried + PRIOR_TOKENS)

    def decide(self, cost: PassCost, tokens: int, wanted: Mapping[int, int]) -> dict[int, int]:
        """How many tokens to draft for each of the sequences ``wanted``, of which so many could be had.

        ``tokens`` are in the pass anyway, of prompts too. All fit into the pass. Those are none that would not make it
        worth its longer time, but for a few now and then: what is not tried is not known."""
        gains: list[tuple[float, int, int]] = []
        for sequence, most in wanted.items():
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
            if length == 0 and sequence in self._seen:
                self._seen[sequence].fade(KEPT_OF_ONE)  # until it is like the others, and tried again if they are
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


def _best(cost: PassCost, tokens: int, gains: list[tuple[float, int, int]]) -> int:
    """How many of ``gains``, the highest first, make the most tokens per second; of equals the fewest."""
    best, rate, useful = 0, tokens / cost.seconds(tokens), float(tokens)
    for number, (gain, _, _) in enumerate(gains, 1):
        useful -= gain
        if useful / cost.seconds(tokens, number) > rate:
            best, rate = number, useful / cost.seconds(tokens, number)
    return best
