"""A model by tokens against each sequence alone, in a random order of everything that can be done to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

from tests.hf.batches import alone, smallest, some_tokens, token_model
from tests.hf.paged import decoder
from tierstore.errors import CapacityError
from tierstore.hf.batch.slices import Slice

PROMPTS = [tuple(some_tokens(20)[:common] + some_tokens(more, more)) for common, more in ((0, 3), (16, 5), (17, 24))]
TEXT = tuple(some_tokens(60, 9))
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
    sealed: bool = field(default=False)


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

    @rule(prompt=st.sampled_from(PROMPTS))
    def add(self, prompt: tuple[int, ...]) -> None:
        number, shared = self.batch.add(prompt)
        assert shared < len(prompt)
        self.known[number] = Known(prompt, shared)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        slices, after = [], []
        for number in data.draw(st.permutations(sorted(self.known)))[: data.draw(st.integers(1, 4))]:
            known, most = self.known[number], data.draw(st.integers(1, 24))
            left = known.prompt[known.length : known.length + most]
            said = known.length - len(known.prompt)
            tokens = left or TEXT[said : said + min(most, 5)]
            wrong = 0 if left else data.draw(st.integers(0, 3))
            if tokens:
                tokens += tuple(some_tokens(wrong, said))
                slices.append(Slice(number, tokens, data.draw(st.integers(0, len(tokens))), prompt=bool(left)))
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

    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        number = self.chosen(data)
        if number is not None:
            known = self.known[number]
            self.batch.seal(number, (known.prompt + TEXT)[: known.length])

    @rule(data=st.data(), back=st.integers(0, 30))
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

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = self.chosen(data)
        if number is not None:
            self.batch.remove(number)
            del self.known[number]

    @rule()
    def lengths(self) -> None:
        assert {number: self.batch.length(number) for number in self.known} == {
            number: known.length for number, known in self.known.items()
        }


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    wanted.cache_clear()
    model_of.cache_clear()


def test_any_order_gives_the_bits_of_each_sequence_alone() -> None:
    run_state_machine_as_test(
        Batch,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
