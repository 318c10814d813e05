"""Runs of numbers name what the numbers name, in their order."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.hf.kv.runs import even_runs, take

NUMBERS = st.lists(st.integers(0, 40), max_size=12)


@settings(max_examples=100, deadline=None)
@given(NUMBERS)
def test_runs_are_the_numbers(numbers: list[int]) -> None:
    runs = list(even_runs(numbers))
    places = list(range(41))
    assert [place for _, run in runs for place in places[run]] == numbers
    assert [number for which, _ in runs for number in numbers[which]] == numbers


@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 8))
def test_even_numbers_are_one_run(first: int, step: int, count: int) -> None:
    assert len(list(even_runs(range(first, first + step * count, step)))) == 1


@settings(max_examples=30, deadline=None)
@given(NUMBERS)
def test_what_is_taken_is_what_an_index_gives(numbers: list[int]) -> None:
    source = torch.randn(41, 2, 3).bfloat16()
    room = torch.full((14, 2, 3), -1.0)
    found = take(source, numbers, room)
    assert torch.equal(found, source[torch.tensor(numbers, dtype=torch.long)].float())
    assert bool((room[len(numbers) :] == -1).all())
