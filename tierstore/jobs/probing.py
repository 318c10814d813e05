"""Measures what a batch plan wants to know, by a few passes of the real model over tokens that mean nothing."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from tierstore.batch_plan import BatchCosts
from tierstore.hf.batch.slices import Capacity, Slice

if TYPE_CHECKING:
    from tierstore.plan import Plan
    from tierstore.report.report import Report

_STRIDE = 7919  # a prime: neighbouring tokens differ, as they should where they choose experts
_LONG = 1.0  # seconds of a pass that need not be measured twice
_WAITED = 0.1  # a pass that waited for so much of its time took as long as its weights did
_FASTER = 0.95  # of the seconds before: a disk that was idle is slow at first
_MOST = 3  # passes more, until none is faster


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
    generated: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> BatchCosts:
    """Seconds of a micro-batch of each of ``sizes`` tokens, and of the weights of a pass.

    Three sizes are measured, by sequences that are gone afterwards: a share of ``generated`` tokens are each of a
    sequence of its own, and a prompt has the others. Sizes between these are taken to lie on lines. The smallest has
    two passes, as the first one brings what stays. So has one whose tokens seem to be no cheaper than those of a
    smaller one, and where nothing streams every short one; the faster pass counts. Where passes wait for weights the
    smallest has some more, until they are no faster any more. Sizes of more tokens than
    ``positions``, or than pages hold, are left out, but for the smallest, which is then padded. ``clock`` gives
    seconds. Raises what the model raises.
    """
    sizes = sorted(set(sizes))
    most = _most_tokens(model.capacity, positions)
    sizes = [size for size in sizes if size <= most] or sizes[:1]
    few = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    seconds: dict[int, float] = {}
    passes: list[tuple[float, float]] = []

    def measure(size: int) -> None:
        model.tokens = size
        tokens = [number * _STRIDE % vocabulary for number in range(min(size, most))]
        passes.append(_time_pass(model, session, _divide(tokens, generated, model.capacity), clock))
        compute = max(passes[-1][0] - passes[-1][1], 1e-9)
        seconds[size] = min(compute, seconds.get(size, compute))

    before = model.tokens
    try:
        for size in (few[0], *few):
            measure(size)
        short = 0.0 if session.plan.streamed_nbytes else _LONG
        for smaller, size in pairwise(few):
            if seconds[size] < short or seconds[size] / size >= seconds[smaller] / smaller:
                measure(size)
        for _ in range(_MOST):
            if not any(map(_waits, passes[1:])):
                break
            fastest = min(took for took, _ in passes[1:])
            measure(few[0])
            if passes[-1][0] >= _FASTER * fastest:
                break
    finally:
        model.tokens = before
    return BatchCosts(_table(sizes, seconds), _transfer_seconds(session.plan, passes[1:]))


def _most_tokens(capacity: Capacity, positions: int | None) -> int:
    """Tokens of a prompt that one pass can take."""
    most = min(capacity.pages, max(1, capacity.open_pages)) * capacity.page_tokens
    return most if positions is None else min(most, positions)


def _divide(tokens: Sequence[int], generated: float, capacity: Capacity) -> list[tuple[int, ...]]:
    """Sequences of one token each, as far as each can have a page open, and one prompt of what is left."""
    most = min(capacity.pages, capacity.open_pages) - -(-len(tokens) // capacity.page_tokens)
    single = max(0, min(int(len(tokens) * generated), len(tokens) - 1, most))
    return [tuple(tokens[single:]), *((token,) for token in tokens[:single])]


def _time_pass(
    model: Model, session: Measured, sequences: Sequence[tuple[int, ...]], clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of a pass, and how many of them compute waited for weights. The first of ``sequences`` is a prompt."""
    held = []
    try:
        slices = []
        for number, tokens in enumerate(sequences):
            sequence, found = model.add(tokens)
            held.append(sequence)
            slices.append(Slice(sequence, tokens[found:], 1, prompt=not number))
        waited = sum(session.report().stall_seconds.values())
        began = clock()
        model.step(slices)
        seconds = clock() - began
        return seconds, sum(session.report().stall_seconds.values()) - waited
    finally:
        for sequence in held:
            model.remove(sequence)


def _waits(taken: tuple[float, float]) -> bool:
    """Whether a pass took as long as its weights did."""
    seconds, waited = taken
    return waited >= _WAITED * seconds


def _transfer_seconds(plan: Plan, passes: Sequence[tuple[float, float]]) -> float:
    """What the weights of a pass take: as long as the fastest, where some had to wait for theirs; where none waited,
    what the links that were measured would take."""
    if not plan.streamed_nbytes:
        return 0.0
    if any(map(_waits, passes)):
        return min(seconds for seconds, _ in passes)
    return max((plan.seconds_each[link] for link in plan.seconds_each if link != "compute"), default=0.0)


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
