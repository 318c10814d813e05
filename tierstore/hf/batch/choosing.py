"""Which token comes next: a pure function of the logits, the text so far, and a number counted from the row's seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tierstore.errors import RowError
from tierstore.sampling import Sampling

_WORD = 1 << 64
_STEPS, _BUCKETS = 32, 4096
"""Logarithms of likelihoods are told apart in so many steps for each unit of them, down to where doubles end."""


class Chooser:
    """Chooses the tokens of sample ``index`` of a row.

    Token ``i`` is that at which the cumulative distribution passes the uniform number of (``seed``, ``index``, ``i``).
    So a drafted token is right if and only if it is the chosen one, and a text is the same with drafts or without,
    greedy or sampled.
    """

    def __init__(self, sampling: Sampling, seed: int, index: int, prompt: Sequence[int]) -> None:
        self._sampling, self._seed, self._index = sampling, seed, index
        self._prompt = np.unique(np.asarray(prompt if sampling.repetition_penalty != 1 else (), dtype=np.int64))

    @np.errstate(over="ignore")  # at a temperature near 0 all but the best are -inf, as they should be
    def choose(self, logits: Tensor, generated: Sequence[int]) -> int:
        """The token after the prompt and what was ``generated``, from ``logits`` float32 [vocabulary] on the CPU.

        What has -inf is never chosen, and of equals the greedy choice is the lowest. Raises ``RowError`` where
        ``logits`` hold what is not a number or infinite, or forbid every token.
        """
        scores = self._penalised(logits.detach().numpy(), generated)
        best = int(scores.argmax())  # the first that is not a number, if there is one
        if not np.isfinite(scores[best]):
            raise RowError(_why_not(float(scores[best]), len(generated)))
        if self._sampling.temperature == 0 or self._sampling.top_k == 1:
            return best
        reached = torch.from_numpy(weights_of(scores, self._sampling)).cumsum(0).numpy()
        place = uniform(self._seed, self._index, len(generated)) * reached[-1]
        if place < reached[-1]:
            return int(reached.searchsorted(place, side="right"))
        return int(reached.searchsorted(reached[-1]))  # rounded up to the very end

    def _penalised(self, logits: NDArray[np.float32], generated: Sequence[int]) -> NDArray[np.float32]:
        sampling = self._sampling
        by_count = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        if sampling.repetition_penalty == 1 and not by_count:
            return logits
        scores = logits.copy()
        seen, counts = np.unique(np.asarray(generated, dtype=np.int64), return_counts=True)
        if sampling.repetition_penalty != 1:
            both = np.union1d(self._prompt, seen)
            both = both[both < len(scores)]  # a prompt may hold tokens that the model never writes
            there, penalty = scores[both], np.float32(sampling.repetition_penalty)
            scores[both] = np.where(there < 0, there * penalty, there / penalty)
        if by_count:
            scores[seen] -= (sampling.presence_penalty + sampling.frequency_penalty * counts).astype(np.float32)
        return scores


def uniform(seed: int, index: int, token: int) -> float:
    """In [0, 1), for ``token`` of sample ``index``: counted, not drawn (Philox 4x64, Salmon et al. 2011)."""
    key = np.array([seed % _WORD, index % _WORD], dtype=np.uint64)
    return (int(np.random.Philox(key=key, counter=token).random_raw()) >> 11) / (1 << 53)


def weights_of(scores: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """How likely each token is, beside the most likely one: 0 for those that ``sampling`` leaves out.

    ``scores`` [vocabulary], the highest finite. As usual the temperature comes first, then ``top_k``, ``top_p`` of what
    is left, and ``min_p``. Of equals at the edge the lowest tokens stay.
    """
    exponents = scores.astype(np.float64)
    exponents -= exponents.max()
    exponents /= sampling.temperature
    weights: NDArray[np.float64] = torch.from_numpy(exponents).exp().numpy()
    if 0 < sampling.top_k < len(scores):
        weights[~_most_likely(scores, sampling.top_k)] = 0
    if sampling.top_p < 1:
        weights[~_nucleus(exponents, weights, sampling.top_p)] = 0
    if sampling.min_p > 0:
        weights[weights < sampling.min_p] = 0
    return weights


def _most_likely(scores: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    edge = np.partition(scores, len(scores) - count)[len(scores) - count]
    kept: NDArray[np.bool_] = scores > edge
    kept[np.flatnonzero(scores == edge)[: count - np.count_nonzero(kept)]] = True
    return kept


def _nucleus(exponents: NDArray[np.float64], weights: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """The most likely tokens, up to the first at which they have ``share`` of the sum. Only those that are about as
    likely as that one are sorted."""
    buckets = np.minimum(exponents * -_STEPS, _BUCKETS - 1).astype(np.int64)
    reached = np.bincount(buckets, weights).cumsum()
    wanted = share * reached[-1]
    last = int(reached.searchsorted(wanted))
    inside = np.flatnonzero(buckets == last)
    inside = inside[np.argsort(-weights[inside], kind="stable")]
    before = reached[last - 1] if last > 0 else 0.0
    kept: NDArray[np.bool_] = buckets < last
    kept[inside[: int(weights[inside].cumsum().searchsorted(wanted - before)) + 1]] = True
    return kept


def _why_not(best: float, token: int) -> str:
    if best == -np.inf:
        return f"token {token} of the answer: every token is forbidden, so none can be chosen"
    return (
        f"token {token} of the answer: the model's logits hold {best}, so no token can be chosen. Numbers may have "
        "overflowed: load the model in bfloat16 or float32"
    )
