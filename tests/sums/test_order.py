"""The order agrees with a naive model of it, step by step."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore import order as order_module
from tierstore.order import Order

UNITS = st.sampled_from("abcd")
SEQUENCES = st.lists(UNITS, max_size=8)


def merged(units: list[str]) -> list[str]:
    return [unit for index, unit in enumerate(units) if index == 0 or units[index - 1] != unit]


class NaiveOrder:
    """The same rules by rotating a list: what is ahead, nearest first, each with whether it was seen out of turn."""

    def __init__(self, sequence: list[str]) -> None:
        self.sequence = merged(sequence)
        self.start()

    def start(self) -> None:
        self.ring = [(unit, False) for unit in self.sequence]
        self.steps = 0
        self.visits: list[str] = []
        self.missed = False

    @property
    def cursor(self) -> int:
        return self.steps % len(self.sequence) if self.sequence else 0

    def turn(self, count: int) -> None:
        for _ in range(count):
            unit, _ = self.ring.pop(0)
            self.ring.append((unit, False))
            self.steps += 1

    def ahead(self) -> list[str]:
        return [unit for unit, seen in self.ring if not seen]

    def distance(self, unit: str) -> int:
        if (unit, False) in self.ring:
            return self.ring.index((unit, False))
        if (unit, True) in self.ring:
            return len(self.ring) + self.ring.index((unit, True))
        return sys.maxsize

    def visit(self, unit: str) -> bool:
        last = self.visits[-1] if self.visits else None
        self.visits.append(unit)
        if last == unit:
            return True
        steps = self.distance(unit)
        expected = steps == 0 or (steps == 1 and last is not None and self.distance(last) == 0)
        if expected:
            self.turn(steps + 1)
        elif steps != sys.maxsize:
            seen = [index for index, (_, flag) in enumerate(self.ring) if flag]
            if steps < min(order_module.WINDOW, len(self.ring) // 2) and len(seen) < order_module.PATIENCE:
                self.ring[steps % len(self.ring)] = (unit, True)
            else:
                self.ring = [(u, False) for u, _ in self.ring]
                self.turn(max([steps, *seen]) + 1)
        while any(flag for _, flag in self.ring) and self.ring[0][1]:
            self.turn(1)
        self.missed = self.missed or not expected
        return expected

    def end_pass(self) -> bool:
        replaced = bool(self.visits) and (self.missed or self.cursor != 0 or len(self.ahead()) != len(self.ring))
        if replaced:
            self.sequence = merged(self.visits)
        self.start()
        return replaced


@given(sequence=SEQUENCES, steps=st.lists(st.one_of(st.just("end of pass"), UNITS, st.just("unknown")), max_size=40))
def test_agrees_with_a_naive_order(sequence: list[str], steps: list[str]) -> None:
    order, naive = Order(sequence), NaiveOrder(sequence)
    for step in steps:
        if step == "end of pass":
            assert order.end_pass() == naive.end_pass()
        else:
            assert order.visit(step) == naive.visit(step)
        assert order.sequence == tuple(naive.sequence)
        assert order.cursor == naive.cursor
        ahead = naive.ahead()
        assert list(order.upcoming()) == ahead
        for unit in "abcd":
            assert order.distance(unit) == naive.distance(unit)


@given(sequence=SEQUENCES.filter(bool), passes=st.integers(1, 4), tell=st.booleans(), repeat=st.integers(1, 3))
def test_a_true_order_never_misses(sequence: list[str], passes: int, tell: bool, repeat: int) -> None:
    order = Order(sequence)
    for _ in range(passes):
        assert all(order.visit(unit) for unit in sequence for _ in range(repeat))
        if tell:
            assert not order.end_pass()
    assert not order.end_pass()
    assert order.sequence == tuple(merged(sequence))


@given(sequence=SEQUENCES, visits=SEQUENCES.filter(bool))
def test_a_pass_that_was_not_foreseen_is_foreseen_the_next_time(sequence: list[str], visits: list[str]) -> None:
    order = Order(sequence)
    for unit in visits:
        order.visit(unit)
    order.end_pass()
    assert all(order.visit(unit) for unit in visits)
    assert not order.end_pass()


def test_a_branch_not_taken_is_learnt() -> None:
    order = Order("abc")
    assert [order.visit("a"), order.visit("c")] == [True, False]
    assert list(order.upcoming()) == ["a", "b", "c"]
    assert order.end_pass()
    assert list(order.sequence) == ["a", "c"]
    assert order.visit("a")
    assert order.end_pass()
    assert list(order.sequence) == ["a"]


def test_tied_ends_of_a_cycle_merge_when_passes_are_not_told_apart() -> None:
    order = Order("abca")
    assert all(order.visit(unit) for unit in "abca" * 5)
    assert order.cursor == 0
    assert not order.end_pass()


def test_a_pass_without_visits_changes_nothing() -> None:
    order = Order("ab")
    assert not order.end_pass()
    assert order.sequence == ("a", "b")
    empty = Order("")
    assert not empty.end_pass()
    assert list(empty.upcoming()) == []
    assert not empty.visit("a")
    assert empty.end_pass()
    assert empty.sequence == ("a",)


def test_a_pass_that_broke_off_teaches_nothing() -> None:
    order = Order("abc")
    order.visit("c")
    order.drop_pass()
    assert (order.sequence, order.cursor) == (("a", "b", "c"), 0)
    assert order.visit("a")


def test_a_pass_without_end_is_followed_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "RECORD_LIMIT", 10)
    order = Order("abc")
    order.visit("b")
    for _ in range(20):
        order.visit("a")
        assert order.visit("b")
        assert order.visit("c")
    assert not order.end_pass()
    assert (order.sequence, order.cursor) == (("a", "b", "c"), 0)


def test_another_order_within_a_stretch_does_not_lose_the_place() -> None:
    order = Order("nAmBoCpD")
    for unit in "AnBmCoDp":
        order.visit(unit)
        assert order.distance(unit) > 4
    assert order.cursor == 0
    assert order.end_pass()
    assert "".join(order.sequence) == "AnBmCoDp"


def test_a_stretch_that_is_left_out_is_left_behind() -> None:
    order = Order("abcdefghijklmnop")
    for unit in "aghijkl":
        order.visit(unit)
    assert next(order.upcoming()) == "m"
