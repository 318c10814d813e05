"""Laws of batch plans: within every bound, near the best there is, and near what the schedule really gives."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from math import ceil
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.batch_plan import BatchCosts, BatchJob, BatchPlan, BatchRoom, KvTier, build_batch_plan
from tierstore.batch_schedule import Limits, Running, Waiting, admit, next_pass
from tierstore.errors import PlanError

CPU = {8: 0.16, 16: 0.17, 32: 0.2, 64: 0.3, 128: 0.56}
"""Seconds of a micro-batch of a model of 3 billion parameters on two cores, as a line through measured points."""


def plan(
    transfer: float = 0.0, *, sequences: int = 5000, prompt: float = 300, new: float = 200, **room: Any
) -> BatchPlan:
    given: dict[str, Any] = {"page_tokens": 64, "open_pages": 5000, "kv": [KvTier(100_000)]} | room
    given["sequences"] = given.pop("sequences_at_once", None)
    return build_batch_plan(BatchCosts(CPU, transfer), BatchJob(sequences, prompt, new, int(new)), BatchRoom(**given))


def test_streaming_is_hidden_behind_compute() -> None:
    found = plan(10.0)
    assert found.bound == "compute"
    assert found.compute_seconds >= found.transfer_seconds / 1.05
    assert found.micro_batches * CPU[found.tokens] <= 1.5 * 10.0 + CPU[found.tokens]
    assert found.tokens_per_second == pytest.approx(128 / 0.56 * 200 / 500, rel=0.06)
    assert "bound by compute" in found.explain()


def test_what_stays_needs_one_micro_batch() -> None:
    found = plan()
    assert (found.tokens, found.micro_batches) == (128, 1)
    assert found.transfer_seconds == 0
    few = plan(sequences=4, prompt=30)
    assert (few.tokens, few.sequences) == (8, 4)


@pytest.mark.parametrize(
    ("changed", "bound", "most"),
    [
        ({"sequences": 20}, "rows", 20),
        ({"kv": [KvTier(100), KvTier(60)]}, "pages", 20),
        ({"open_pages": 20}, "open pages", 20),
        ({"sequences_at_once": 3}, "sequences", 3),
        ({"activations": 10**6, "layer_nbytes_per_token": 10**4, "waiting_nbytes_per_token": 10**4}, "activations", 80),
    ],
)
def test_what_binds_is_named(changed: dict[str, Any], bound: str, most: int) -> None:
    found = plan(10.0, **changed)
    assert found.bound == bound
    assert found.sequences <= most
    assert found.wanted > found.sequences
    assert f"bound by {bound}" in found.explain()
    assert f"{found.wanted} sequences would keep the processor busy" in found.explain()


def test_pages_that_must_come_back_can_cost_more_than_they_bring() -> None:
    slow = plan(1.0, kv=[KvTier(100), KvTier(100_000, seconds_per_page=0.1)])
    fast = plan(1.0, kv=[KvTier(100_100)])
    assert slow.bound == "transfer"
    assert slow.transfer_seconds > 1.0
    assert slow.tokens_per_second < fast.tokens_per_second / 2


def test_activations_that_hold_no_micro_batch_are_refused() -> None:
    with pytest.raises(PlanError, match=r"raise Budget\.activations to at least 8000 bytes") as refused:
        plan(activations=7999, layer_nbytes_per_token=1000)
    assert refused.value.needed == 8000
    assert plan(activations=8000, layer_nbytes_per_token=1000).tokens == 8


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: plan(-1.0),
        lambda: plan(sequences=0),
        lambda: plan(new=0),
        lambda: plan(page_tokens=0),
        lambda: plan(sequences_at_once=0),
        lambda: build_batch_plan(BatchCosts({}, 0.0), BatchJob(1, 1, 1, 1), BatchRoom(1, 1, [])),
        lambda: build_batch_plan(BatchCosts({8: 0.0}, 0.0), BatchJob(1, 1, 1, 1), BatchRoom(1, 1, [])),
    ],
)
def test_numbers_that_cannot_be_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"needed|negative"):
        wrong()


seconds = st.sampled_from([0.0, 0.01, 0.5, 8.0, 300.0])


@settings(max_examples=30, deadline=None)
@given(
    transfer=seconds,
    job=st.builds(
        lambda sequences, prompt, new, more: BatchJob(sequences, prompt, new, int(new) + 1 + more),
        st.sampled_from([1, 7, 300, 10**6]),
        st.floats(1, 5000),
        st.floats(1, 1000),
        st.integers(0, 1000),
    ),
    pages=st.integers(1, 10**6),
    open_pages=st.integers(1, 1000),
    activations=st.none() | st.integers(128 * 100, 10**8),
    slow=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_every_plan_is_within_its_bounds(
    transfer: float, job: BatchJob, pages: int, open_pages: int, activations: int | None, slow: float
) -> None:
    costs = BatchCosts(CPU, transfer, 0.01)
    room = BatchRoom(64, open_pages, [KvTier(pages), KvTier(pages, slow)], 100, 50, activations)
    found = build_batch_plan(costs, job, room)
    assert found.tokens in CPU
    assert 1 <= found.sequences <= min(job.sequences, max(1, 2 * pages), open_pages)
    if activations is not None:
        assert found.tokens * (100 + 50 * (found.micro_batches - 1)) <= activations
    assert found.transfer_seconds >= transfer
    assert found.seconds_per_pass >= max(found.compute_seconds, found.transfer_seconds)
    assert 0 <= found.tail_seconds <= found.seconds
    best = min(seconds / tokens for tokens, seconds in CPU.items())
    assert found.tokens_per_second <= 1.001 * job.new_tokens / (job.prompt_tokens + job.new_tokens - 1) / best
    assert len(found.explain().splitlines()) in (4, 5)
    # whatever size is decided before, the free choice is about as fast
    for tokens in CPU:
        fixed = build_batch_plan(replace(costs, compute_seconds={tokens: CPU[tokens]}), job, room)
        assert found.seconds <= 1.25 * fixed.seconds


def simulate(found: BatchPlan, transfer: float, room: BatchRoom, rows: list[tuple[int, int]]) -> float:
    """Seconds of a job whose passes take what the plan was told."""
    limits = Limits(found.tokens, found.micro_batches, found.sequences, room.page_tokens, room.pages, room.open_pages)
    waiting = deque(Waiting(number, prompt, new) for number, (prompt, new) in enumerate(rows))
    live: list[Running] = []
    seconds = 0.0
    while waiting or live:
        for _ in admit(live, waiting, limits):
            row = waiting.popleft()
            live.append(Running(row.row, row.row, row.prompt_tokens, row.new_tokens, 0))
        got = {part.sequence: part.tokens for part in next_pass(live, limits)}
        seconds += max(ceil(sum(got.values()) / found.tokens) * CPU[found.tokens], transfer)
        live = [replace(each, length=each.length + got.get(each.sequence, 0)) for each in live]
        live = [each for each in live if each.length < each.prompt_tokens + each.new_tokens - 1]
    return seconds


@pytest.mark.parametrize("transfer", [0.0, 2.0])
@pytest.mark.parametrize(("prompts", "news"), [((5, 20), (40, 60)), ((500, 1500), (10, 30))])
@pytest.mark.parametrize("pages", [200, 20_000])
def test_a_job_takes_about_as_long_as_predicted(
    transfer: float, prompts: tuple[int, int], news: tuple[int, int], pages: int
) -> None:
    dice = Random(0)
    rows = [(dice.randint(*prompts), dice.randint(*news)) for _ in range(100)]
    mean = [sum(each) / len(rows) for each in zip(*rows, strict=True)]
    job = BatchJob(len(rows), mean[0], mean[1], max(new for _, new in rows))
    room = BatchRoom(64, 100, [KvTier(pages)])
    found = build_batch_plan(BatchCosts(CPU, transfer), job, room)
    assert simulate(found, transfer, room, rows) == pytest.approx(found.seconds, rel=0.3)


@pytest.mark.parametrize("transfer", [0.0, 2.0])
@pytest.mark.parametrize("new", [10, 24])
@pytest.mark.parametrize("prompt", [1, 2, 40])
@pytest.mark.parametrize("sequences", [1, 8, 32, 100])
def test_a_short_job_takes_as_long_as_predicted(transfer: float, new: int, prompt: int, sequences: int) -> None:
    room = BatchRoom(64, 1000, [KvTier(1000)])
    for costs in (BatchCosts(CPU, transfer), BatchCosts({32: CPU[32]}, transfer)):
        found = build_batch_plan(costs, BatchJob(sequences, prompt, new, new), room)
        assert simulate(found, transfer, room, [(prompt, new)] * sequences) == pytest.approx(found.seconds, rel=0.15)
