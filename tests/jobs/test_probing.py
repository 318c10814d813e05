"""Probing finds what a model of known costs takes, whatever disturbs it, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from tierstore.errors import CapacityError
from tierstore.hf.batch.slices import Capacity, Slice
from tierstore.jobs.probing import probe
from tierstore.plan import Plan
from tierstore.report.report import Report

PLAN = Plan(
    order=("a",),
    tier={},
    unified=False,
    ring_nbytes=0,
    staging_nbytes=0,
    resident_nbytes={},
    streamed_nbytes=0,
    share=1.0,
    seconds_per_pass=0.0,
    seconds_each={"compute": 9.0, "nvme": 0.25, "ram": 0.125},
    bound="nvme",
)
REPORT = Report(peak_bytes={}, links={}, stall_seconds={}, misses=0, resident_share=0.0, passes=0, seconds=0.0)


@dataclass
class Fake:
    """A model and its session: a pass takes ``compute(tokens)`` seconds and ``noise``, or the ``transfer`` of weights,
    which is ``late`` by so many seconds in the first passes.

    The first pass takes 5 seconds more."""

    compute: Callable[[int], float]
    transfer: float = 0.0
    noise: Sequence[float] = (0.0,)
    late: Sequence[float] = ()
    capacity: Capacity = field(default_factory=lambda: Capacity(64, 1000, 100))
    tokens: int = 7
    now: float = 0.0
    waited: float = 0.0
    held: set[int] = field(default_factory=set)
    passes: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    number: int = 0

    @property
    def plan(self) -> Plan:
        return replace(PLAN, streamed_nbytes=1 if self.transfer else 0)

    def report(self) -> Report:
        return replace(REPORT, stall_seconds={"a": self.waited / 2, "b": self.waited / 2})

    def add(self, tokens: Sequence[int]) -> tuple[int, int]:
        self.number += 1
        self.held.add(self.number)
        return self.number, 0

    def remove(self, sequence: int) -> None:
        self.held.remove(sequence)

    def step(self, slices: Sequence[Slice]) -> None:
        assert {given.sequence for given in slices} == self.held
        assert [given.prompt for given in slices] == [True] + [False] * (len(slices) - 1)
        compute = self.compute(self.tokens) + self.noise[len(self.passes) % len(self.noise)]
        first = 0.0 if self.passes else 5.0
        transfer = self.transfer + (self.late[len(self.passes)] if len(self.passes) < len(self.late) else 0.0)
        self.waited += max(0.0, transfer - compute)
        self.now += max(compute, transfer) + first
        self.shapes.append([len(given.tokens) for given in slices])
        self.passes.append((self.tokens, tuple(token for given in slices for token in given.tokens)))

    def probe(self, sizes: Sequence[int], *, positions: int | None = None) -> tuple[dict[int, float], float]:
        costs = probe(self, self, sizes, vocabulary=50, positions=positions, clock=lambda: self.now)
        assert not self.held
        assert self.tokens == 7
        assert all(0 <= token < 50 for _, prompt in self.passes for token in prompt)
        return dict(costs.compute_seconds), costs.transfer_seconds


def test_lines_are_found_exactly() -> None:
    fake = Fake(lambda tokens: 0.1 + tokens / 640)
    found, transfer = fake.probe([128, 8, 16, 32, 64])
    assert found == pytest.approx({8: 0.1125, 16: 0.125, 32: 0.15, 64: 0.2, 128: 0.3})
    assert [tokens for tokens, _ in fake.passes] == [8, 8, 32, 128, 32, 128]
    assert transfer == 0


def test_the_faster_of_two_passes_counts() -> None:
    disturbed = Fake(lambda tokens: 0.1 + tokens / 640, noise=(0.0, 0.0, 0.1, 0.2, 0.0, 0.0))
    assert disturbed.probe([8, 32, 128])[0] == pytest.approx({8: 0.1125, 32: 0.15, 128: 0.3})


def test_long_passes_are_made_once_but_where_they_surprise() -> None:
    fake = Fake(lambda tokens: 1 + tokens / 64, noise=(0.0, 0.0, 9.0, 0.0, 0.0))
    assert fake.probe([8, 32, 128])[0] == pytest.approx({8: 1.125, 32: 1.5, 128: 3.0})
    assert [tokens for tokens, _ in fake.passes] == [8, 8, 32, 128, 32]


@pytest.mark.parametrize(("generated", "single"), [(0.0, 0), (0.5, 16), (1.0, 31)])
def test_tokens_are_of_a_prompt_and_of_many_sequences(generated: float, single: int) -> None:
    fake = Fake(lambda tokens: 1.0)
    probe(fake, fake, [32], vocabulary=50, generated=generated, clock=lambda: fake.now)
    assert fake.shapes == [[32 - single, *[1] * single]] * 2
    small = Fake(lambda tokens: 1.0, capacity=Capacity(64, 1000, 5))
    probe(small, small, [32], vocabulary=50, generated=1.0, clock=lambda: small.now)
    assert small.shapes[0] == [28, 1, 1, 1, 1], "each has a page open"


def test_what_streams_has_a_pass_more() -> None:
    fake = Fake(lambda tokens: 1 + tokens / 64, transfer=10.0)
    found, transfer = fake.probe([8, 16, 32, 64, 128])
    assert [tokens for tokens, _ in fake.passes] == [8, 8, 32, 128, 8]
    assert [len(prompt) for _, prompt in fake.passes] == [8, 8, 32, 128, 8]
    assert len(set(fake.passes[3][1])) > 10, "tokens differ, as experts are chosen by them"
    assert found == pytest.approx({8: 1.125, 16: 1.25, 32: 1.5, 64: 2.0, 128: 3.0})
    assert transfer == 10.0


@pytest.mark.parametrize(
    ("late", "passes", "transfer"),
    [
        ((5.0, 3.0, 2.0, 0.0, 0.0), 5, 4.0),
        ((6.0, 6.0, 6.0, 6.0, 6.0), 5, 10.0),
        ((9.0, 7.0, 5.0, 2.5, 1.2), 7, 4.0),
    ],
)
def test_a_disk_that_is_slow_at_first(late: Sequence[float], passes: int, transfer: float) -> None:
    fake = Fake(lambda tokens: 1.0, transfer=4.0, late=late)
    assert fake.probe([8, 32, 128])[1] == pytest.approx(transfer)
    assert len(fake.passes) == passes


def test_a_pass_that_never_waits_has_the_figures_of_the_links() -> None:
    assert Fake(lambda tokens: 3.0, transfer=0.1).probe([8, 16])[1] == 0.25


def test_more_tokens_never_seem_to_take_less() -> None:
    found, _ = Fake(lambda tokens: 1.0, transfer=9.0, noise=(0.0, 4.0, 2.0, 0.0)).probe([8, 32, 128])
    assert found == pytest.approx({8: 1.0, 32: 1.0, 128: 1.0})


def test_sizes_that_cannot_be_are_left_out() -> None:
    assert list(Fake(lambda tokens: 1.0).probe([8, 64, 128], positions=100)[0]) == [8, 64]
    small = Fake(lambda tokens: 1.0, capacity=Capacity(4, 1000, 2))
    assert list(small.probe([32, 64])[0]) == [32]
    assert {len(prompt) for _, prompt in small.passes} == {8}


def test_a_model_that_fails_is_left_as_it_was() -> None:
    def fail(tokens: int) -> float:
        raise CapacityError("no room")

    fake = Fake(fail)
    with pytest.raises(CapacityError):
        fake.probe([8])
    assert not fake.held
    assert fake.tokens == 7
