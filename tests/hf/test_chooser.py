"""Choosing tokens: what transformers would keep, in the right proportions, and never by chance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as theirs

from tierstore.errors import RowError
from tierstore.hf.batch.choosing import Chooser, uniform, weights_of
from tierstore.sampling import Sampling

VOCABULARY = 40


@st.composite
def logits(draw: st.DrawFn, *, ties: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    found = torch.randn(VOCABULARY, generator=generator) * draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 60.0]))
    if ties:
        found = found.round()
        found[torch.randperm(VOCABULARY, generator=generator)[: draw(st.integers(0, VOCABULARY - 1))]] = -math.inf
    else:
        found += torch.linspace(0, 1e-3, VOCABULARY)
    return found


SETTINGS = st.builds(
    Sampling.checked,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.7, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 39, 40, 100]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
SEEDS = st.integers(0, (1 << 63) - 1)
NUMBERS = [0.8720734548204873, 0.8824668302545412, 0.7418236292202388]


@given(scores=logits(), sampling=SETTINGS, seed=SEEDS, prompt=TOKENS, generated=TOKENS)
@settings(max_examples=60)
def test_the_same_again_and_never_what_is_forbidden(
    scores: Tensor, sampling: Sampling, seed: int, prompt: list[int], generated: list[int]
) -> None:
    before = scores.clone()
    chooser = Chooser(sampling, seed, 3, prompt)
    chosen = chooser.choose(scores, generated)
    chooser.choose(scores, [*generated, chosen])  # a draft that is verified on the way leaves no trace
    chooser.choose(scores, [])
    again = Chooser(sampling, seed, 3, prompt).choose(scores.clone(), tuple(generated))
    assert chosen == again == chooser.choose(scores, generated)
    assert type(chosen) is int
    assert scores[chosen] > -math.inf
    assert torch.equal(scores, before)


@given(scores=logits(), sampling=SETTINGS, seed=SEEDS, prompt=TOKENS, generated=TOKENS)
@settings(max_examples=60)
def test_the_one_most_likely_is_the_greedy_choice(
    scores: Tensor, sampling: Sampling, seed: int, prompt: list[int], generated: list[int]
) -> None:
    chosen = [
        Chooser(Sampling.checked(sampling, **changed), seed, 0, prompt).choose(scores, generated)
        for changed in ({"temperature": 0}, {"top_k": 1, "temperature": 1})
    ]
    assert chosen[0] == chosen[1]
    without: dict[str, Any] = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "temperature": 0}
    plain = Chooser(Sampling.checked(sampling, **without), seed, 0, prompt).choose(scores, generated)
    assert plain == scores.tolist().index(max(scores.tolist()))


@given(scores=logits(ties=False), sampling=SETTINGS, prompt=TOKENS, generated=TOKENS)
@settings(max_examples=80, deadline=None)
def test_it_keeps_what_transformers_keeps(
    scores: Tensor, sampling: Sampling, prompt: list[int], generated: list[int]
) -> None:
    sampling = Sampling.checked(sampling, presence_penalty=0, frequency_penalty=0)
    processors: list[Any] = [theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if sampling.temperature:
        processors.append(theirs.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(theirs.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(theirs.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(theirs.MinPLogitsWarper(sampling.min_p))
    ids, expected = torch.tensor([[*prompt, *generated]], dtype=torch.int64), scores[None].double()
    for processor in processors:
        expected = processor(ids, expected.clone())
    chooser = Chooser(sampling, 0, 0, prompt)
    if not sampling.temperature:
        assert chooser.choose(scores, generated) == int(expected.argmax())
        return
    weights = torch.from_numpy(weights_of(chooser._penalised(scores.numpy(), generated), sampling))
    torch.testing.assert_close(weights / weights.sum(), expected[0].softmax(0), rtol=1e-4, atol=1e-7)


def test_penalties_by_count() -> None:
    scores = torch.tensor([2.0, 1.6, 1.0, 0.0])
    options: dict[str, Any] = {"presence_penalty": 0.3, "frequency_penalty": 0.2}
    chooser = Chooser(Sampling.checked(**options), 0, 0, [0, 0, 0])
    assert chooser.choose(scores, []) == 0, "the prompt does not count"
    assert chooser.choose(scores, [0]) == 1
    assert chooser.choose(scores, [0, 1, 1]) == 0
    assert chooser.choose(scores, [0] * 4 + [1] * 4) == 2


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 6}]
)
def test_tokens_come_in_the_right_proportions(options: dict[str, Any]) -> None:
    """Chi-square over 2000 samples of one row, each a stream of its own, and over 2000 tokens of one sample."""
    sampling = Sampling.checked(**{"temperature": 1.0, **options})
    scores = torch.linspace(0, 2, 8)[torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])]
    weights = weights_of(scores.numpy(), sampling)
    chooser = Chooser(sampling, 5, 0, [])
    over_samples = [Chooser(sampling, 5, index, []).choose(scores, [1, 2]) for index in range(2000)]
    over_tokens = [chooser.choose(scores, [0] * count) for count in range(2000)]
    for chosen in (over_samples, over_tokens):
        counts, expected = np.bincount(chosen, minlength=8), weights / weights.sum() * 2000
        assert not counts[expected == 0].any()
        kept = expected > 0
        assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 24.3  # 1 in 1000 at 7 degrees of freedom


@given(seed=SEEDS, other=SEEDS, token=st.integers(0, 1 << 20))
def test_numbers_are_counted(seed: int, other: int, token: int) -> None:
    found = uniform(seed, 0, token)
    assert 0 <= found < 1
    assert found == uniform(seed, 0, token)
    assert len({found, uniform(seed, 1, token), uniform(seed, 0, token + 1)}) == 3
    assert (found == uniform(other, 0, token)) == (seed == other)


def test_numbers_stay_what_they_are() -> None:
    """A job that is resumed with another release of tierstore or of numpy goes on with the same text."""
    assert [uniform(7, 0, 0), uniform(7, 1, 0), uniform((1 << 63) - 1, 2, 5)] == pytest.approx(NUMBERS, abs=0)


def test_the_end_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, sampling = torch.tensor([0.0, 0.1, 0.2, -math.inf, -math.inf]), Sampling.checked(temperature=1)
    for number, chosen in ((0.0, 0), (1 - 2**-53, 2), (1.0, 2)):
        monkeypatch.setattr("tierstore.hf.batch.choosing.uniform", lambda *_, number=number: number)
        assert Chooser(sampling, 0, 0, []).choose(scores, []) == chosen
    monkeypatch.setattr("tierstore.hf.batch.choosing.uniform", lambda *_: 0.0)
    assert Chooser(sampling, 0, 0, []).choose(scores.flip(0), []) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("odd", "words"), [(math.nan, "hold nan"), (math.inf, "hold inf"), (-math.inf, "every token is forbidden")]
)
def test_logits_that_are_none(temperature: float, odd: float, words: str) -> None:
    scores = torch.full((6,), odd) if odd == -math.inf else torch.zeros(6)
    scores[4] = odd
    with pytest.raises(RowError, match=f"token 2 of the answer.*{words}"):
        Chooser(Sampling.checked(temperature=temperature), 0, 0, []).choose(scores, [1, 1])


def test_extremes() -> None:
    scores = torch.tensor([-3e38, 3e38, 1.0])
    for temperature in (1e-300, 1.0, 100.0):
        assert Chooser(Sampling.checked(temperature=temperature, top_p=0.5), 1, 0, []).choose(scores, []) == 1
    penalised = Chooser(Sampling.checked(repetition_penalty=2.0), 0, 0, [1, 10**6])
    assert penalised.choose(torch.tensor([1.0, 1.5]), []) == 0, "tokens beyond the vocabulary are left out"
