"""Measures what a batch plan wants to know, by a few passes of the real model over tokens that mean nothing."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tierstore.batch_plan import BatchCosts
from tierstore.hf.batch.slices import Capacity, Slice

if TYPE_CHECKING:
    from tierstore.plan import Plan
    from tierstore.report.report import Report

_STRIDE = 7919  # a prime: neighbouring tokens differ, as they should where they choose experts
_WAITED = 0.1  # a pass that waited for so much of its time took as long as its weights did


class Model(Protocol):
    """What is measured: ``hf.batch.tokens.TokenModel``, or what does the same in another way."""

    tokens: int

    @property
    def capacity(self) -> Capacity: ...
    def add(self, tokens: Sequence[int]) -> tuple[int, int]: ...
    def remove(self, sequence: int) -> None: ...
    def step(self, slices: Sequence[Slice]) -> Any: ...


class Measured(Protocol):
    """The session that the model runs in."""

    @property
    def plan(self) -> Plan: ...
    def report(self) -> Report: ...


def probe(
    model: Model,
    session: Measured,
    sizes: Sequence[int],
    *,
    vocabulary: int,
    positions: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> BatchCosts:
    """Seconds of a micro-batch of each of ``sizes`` tokens, and of the weights of a pass.

    Three sizes are measured, each by a prompt of as many tokens that is gone afterwards; those between them are taken
    to lie on lines. The smallest has two passes, as the first one brings what stays; where nothing streams all have
    two, and the faster one counts. Sizes of more tokens than ``positions``, or than pages hold, are left out, but for
    the smallest, which then has a shorter prompt. ``clock`` gives seconds. Raises what the model raises.
    """
    sizes = sorted(set(sizes))
    longest = _longest_prompt(model.capacity, positions)
    sizes = [size for size in sizes if size <= longest] or sizes[:1]
    few = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    seconds: dict[int, float] = {}
    passes: list[tuple[float, float]] = []

    def measure(size: int) -> None:
        prompt = [number * _STRIDE % vocabulary for number in range(min(size, longest))]
        passes.append(_time_pass(model, session, size, prompt, clock))
        compute = max(passes[-1][0] - passes[-1][1], 1e-9)
        seconds[size] = min(compute, seconds.get(size, compute))

    before = model.tokens
    try:
        for size in (few[0], *few):
            measure(size)
        if not session.plan.streamed_nbytes:
            for size in few[1:]:
                measure(size)
    finally:
        model.tokens = before
    return BatchCosts(_table(sizes, seconds), _transfer_seconds(session.plan, passes[1:]))


def _longest_prompt(capacity: Capacity, positions: int | None) -> int:
    """Tokens of a prompt that one pass can take."""
    most = min(capacity.pages, max(1, capacity.open_pages)) * capacity.page_tokens
    return most if positions is None else min(most, positions)


def _time_pass(
    model: Model, session: Measured, size: int, prompt: Sequence[int], clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of a pass of one micro-batch, and how many of them compute waited for weights."""
    model.tokens = size
    sequence, found = model.add(prompt)
    try:
        waited = sum(session.report().stall_seconds.values())
        began = clock()
        model.step([Slice(sequence, tuple(prompt[found:]), 1, True)])
        seconds = clock() - began
        return seconds, sum(session.report().stall_seconds.values()) - waited
    finally:
        model.remove(sequence)


def _transfer_seconds(plan: Plan, passes: Sequence[tuple[float, float]]) -> float:
    """What a pass takes that waits for its weights; where none waited, what the links that were measured would take."""
    if not plan.streamed_nbytes:
        return 0.0
    bound = [seconds for seconds, waited in passes if waited >= _WAITED * seconds]
    return min(
        bound, default=max((plan.seconds_each[link] for link in plan.seconds_each if link != "compute"), default=0)
    )


def _table(sizes: Sequence[int], measured: Mapping[int, float]) -> dict[int, float]:
    """Seconds of every size. More tokens never take less: where they seem to, the smaller size was disturbed."""
    known = sorted(measured)
    least = [min(measured[other] for other in known if other >= size) for size in known]

    def between(size: int) -> float:
        at = bisect_left(known, size)
        if known[at] == size:
            return least[at]
        part = (size - known[at - 1]) / (known[at] - known[at - 1])
        return least[at - 1] + part * (least[at] - least[at - 1])

    return {size: between(size) for size in sizes}
