"""How near a packed model's next-token distributions are to those of the model it was packed from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likeness:
    """``kl`` is the mean over all positions of the Kullback-Leibler divergence, in nats, of the model's distribution
    from the reference's; the perplexities are those of the tokens that follow."""

    kl: float
    perplexity: float
    reference_perplexity: float


def windows_of(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """The first ``count`` windows of ``length`` tokens of ``text``, or as many whole ones as it has."""
    tokens = tokenizer(text[: count * length * 20], return_tensors="pt", verbose=False)["input_ids"][0]
    whole = min(len(tokens) // length, count)
    return tokens[: whole * length].view(whole, length)  # type: ignore[no-any-return]


def log_probabilities(model: Any, windows: Tensor) -> Iterator[Tensor]:
    """For each window, float32 [length, vocabulary]."""
    with torch.no_grad():
        for window in windows:
            yield torch.log_softmax(model(window[None], use_cache=False).logits[0].float(), -1)


def compare(reference: list[Tensor], model: Any, windows: Tensor) -> Likeness:
    """How like ``model`` is to the one whose log-probabilities are the ``reference``."""
    return likeness_of(reference, log_probabilities(model, windows), windows)


def likeness_of(reference: Iterable[Tensor], others: Iterable[Tensor], windows: Iterable[Tensor]) -> Likeness:
    """How like log-probabilities [length, vocabulary] are to those of the ``reference``, for the tokens of windows."""
    kl, own, theirs = [], [], []
    for window, true, found in zip(windows, reference, others, strict=True):
        kl.append((true.exp() * (true - found)).sum(-1).mean())
        own.append(_surprise(found, window))
        theirs.append(_surprise(true, window))
    mean_kl, mean_own, mean_theirs = (float(torch.stack(values).mean()) for values in (kl, own, theirs))
    return Likeness(mean_kl, exp(mean_own), exp(mean_theirs))


def _surprise(probabilities: Tensor, window: Tensor) -> Tensor:
    return -probabilities[:-1].gather(1, window[1:, None]).mean()
