"""A model by tokens against each sequence alone, in a random order of everything that can be done to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor

from tests.hf.batches import alone, smallest, some_tokens, token_model
from tests.hf.paged import decoder
from tierstore.errors import CapacityError
from tierstore.hf.batch.slices import Slice

PROMPTS = [tuple(some_tokens(20)[:common] + some_tokens(more, more)) for common, more in ((0, 3), (16, 5), (17, 24))]
TEXT = tuple(some_tokens(30, 9))
"""What every sequence says: so the number of its tokens tells which they are."""


@lru_cache
def model_of(name: str) -> Any:
    return decoder(name)


@lru_cache
def wanted(name: str, prompt: tuple[int, ...]) -> Tensor:
    """Logits of all tokens of a prompt and the text after it."""
    return alone(model_of(name), prompt, TEXT)


@dataclass
class Known:
    prompt: tuple[int, ...]
    length: int


class Batch(RuleBasedStateMachine):
    """Sequences come, grow, fork, are cut and go, in whatever room there is."""

    @initialize(
        name=st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM"]),
        below=st.sampled_from([{}, {"kv_ram": 1 << 16}, {"kv_ram": 1 << 15, "kv_nvme": 1 << 17}]),
        more=st.sampled_from([1 << 14, 1 << 17]),
    )
    def begin(self, name: str, below: dict[str, Any], more: int) -> None:
        self.name, self.open = name, ExitStack()
        folder = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
        model = model_of(name)
        budget = {"kv_hbm": smallest(model, **below) + more, **below}
        self.batch = self.open.enter_context(token_model(model, folder, **budget))
        self.known: dict[int, Known] = {}

    def teardown(self) -> None:
        if hasattr(self, "open"):
            self.open.close()

    def chosen(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from(sorted(self.known))) if self.known else None

    @rule(prompt=st.sampled_from(PROMPTS), most=st.sampled_from([7, 24, 41]))
    def add(self, prompt: tuple[int, ...], most: int) -> None:
        number, shared = self.batch.add(prompt)
        assert shared < len(prompt)
        self.known[number] = Known(prompt, shared)
        for _ in range(2):
            self.go_on([(number, most, 0)])

    @rule(data=st.data(), times=st.integers(1, 4), most=st.integers(1, 24), wrong=st.integers(0, 3))
    def step(self, data: st.DataObject, times: int, most: int, wrong: int) -> None:
        some = data.draw(st.permutations(sorted(self.known)))[:4]
        for _ in range(times):
            self.go_on([(number, most, wrong) for number in some])

    def go_on(self, chosen: list[tuple[int, int, int]]) -> None:
        """Of each sequence its next tokens, and some that are taken back."""
        slices, after = [], []
        for number, most, wrong in chosen:
            known = self.known[number]
            left = known.prompt[known.length : known.length + most]
            said = known.length - len(known.prompt)
            tokens, wrong = left or TEXT[said : said + min(most, 5)], 0 if left else wrong
            if tokens:
                tokens += tuple(some_tokens(wrong, said))
                slices.append(Slice(number, tokens, len(tokens) - number % 2, prompt=bool(left)))
                after.append((number, known.length + len(tokens) - wrong, wrong))
        try:
            found = self.batch.step(slices)
        except CapacityError:
            return
        for each, (number, length, wrong), logits in zip(slices, after, found, strict=True):
            alike = wanted(self.name, self.known[number].prompt)[length + wrong - each.logits : length]
            assert logits.shape[0] == each.logits
            assert torch.equal(logits[: len(alike)], alike[: len(logits)])
            self.known[number].length = length
            self.batch.crop(number, length)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        number = self.chosen(data)
        if number is not None:
            self.known[self.batch.fork(number)] = replace(self.known[number])

    @rule(data=st.data(), back=st.integers(1, 30))
    def crop(self, data: st.DataObject, back: int) -> None:
        number = self.chosen(data)
        if number is None:
            return
        known = self.known[number]
        length = max(known.length - back, 0)
        try:
            self.batch.crop(number, length)
        except ValueError:
            assert self.name != "LlamaForCausalLM"
            return
        known.length = length
        self.go_on([(number, back, 0)])

    @rule(data=st.data())
    def seal_and_remove(self, data: st.DataObject) -> None:
        number = self.chosen(data)
        if number is not None:
            known = self.known.pop(number)
            self.batch.seal(number, (known.prompt + TEXT)[: known.length])
            self.batch.remove(number)

    @invariant()
    def lengths_are_known(self) -> None:
        for number, known in getattr(self, "known", {}).items():
            assert self.batch.length(number) == known.length


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    wanted.cache_clear()
    model_of.cache_clear()


def test_any_order_gives_the_bits_of_each_sequence_alone() -> None:
    run_state_machine_as_test(
        Batch,
        settings=settings(
            max_examples=30,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
