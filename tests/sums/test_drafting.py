"""Drafts: what is looked up, and that no more and no less is drafted than pays."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.drafting import LONGEST, PROBING, DraftLength, Lookup, PassCost

FEW_TOKENS = st.lists(st.integers(0, 3), max_size=40)
SECONDS = st.sampled_from([0.0, 0.1, 1.0, 3.0])
COSTS = st.builds(PassCost, st.integers(1, 20), st.integers(1, 5), SECONDS, SECONDS, st.just(0.05), SECONDS)
WANTED = st.dictionaries(st.integers(0, 9), st.integers(0, 6), max_size=6)
BOUND_BY_TRANSFER = PassCost(16, 8, compute_seconds=0.1, transfer_seconds=10.0)
BOUND_BY_COMPUTE = PassCost(16, 8, compute_seconds=1.0, transfer_seconds=0.1)


def found_by_looking(tokens: list[int], most: int) -> tuple[int, list[int]]:
    for n in range(min(LONGEST, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                text = tokens[:]
                while len(text) < len(tokens) + most:
                    text.append(text[start + n + len(text) - len(tokens)])
                return n, text[len(tokens) :]
    return 0, []


@given(pieces=st.lists(FEW_TOKENS, max_size=4), most=st.integers(0, 9))
@settings(max_examples=80)
def test_the_longest_run_where_it_was_last(pieces: list[list[int]], most: int) -> None:
    lookup, tokens = Lookup(), list[int]()
    for piece in pieces:
        lookup.extend(piece)
        tokens += piece
        assert (lookup.run, lookup.draft(most)) == found_by_looking(tokens, most)


def test_any_token_and_no_others() -> None:
    high = (1 << 32) - 1
    assert Lookup([high, high, 0, high, high]).draft(2) == [0, high]
    assert Lookup([0, 0, 1, 0]).draft(1) == [1]
    for odd in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            Lookup([odd])


def learned(most: int, tried: list[tuple[int, int, int]]) -> DraftLength:
    length = DraftLength(most)
    for sequence, drafted, accepted in tried:
        length.observe(sequence, drafted, accepted)
    return length


TRIED = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 8), st.integers(0, 8)).map(lambda t: (t[0], max(t[1:]), min(t[1:]))),
    max_size=30,
)


@given(cost=COSTS, tokens=st.integers(0, 120), wanted=WANTED, most=st.integers(0, 5), tried=TRIED)
def test_never_beyond_what_there_is(
    cost: PassCost, tokens: int, wanted: dict[int, int], most: int, tried: list[tuple[int, int, int]]
) -> None:
    length = learned(most, tried)
    for _ in range(3):
        found = length.decide(cost, tokens, wanted)
        assert found.keys() == wanted.keys()
        assert all(0 <= found[sequence] <= min(wanted[sequence], most) for sequence in wanted)
        assert sum(found.values()) <= max(cost.tokens * cost.micro_batches - tokens, 0)
        assert all(0 < length.acceptance(sequence) < 1 for sequence in wanted)


@given(cost=COSTS, tokens=st.integers(1, 30), wanted=WANTED.filter(lambda w: len(w) < 4), tried=TRIED)
@settings(max_examples=60)
def test_no_other_choice_is_expected_to_be_faster(
    cost: PassCost, tokens: int, wanted: dict[int, int], tried: list[tuple[int, int, int]]
) -> None:
    length = learned(3, tried)
    acceptances = {sequence: length.acceptance(sequence) for sequence in wanted}

    def rate(lengths: dict[int, int]) -> float:
        right = sum(acceptances[s] ** nth for s, count in lengths.items() for nth in range(1, count + 1))
        return (tokens + right) / cost.seconds(tokens, sum(lengths.values()))

    found = length.decide(cost, tokens, wanted)
    if not any(found.values()):
        found = dict.fromkeys(wanted, 0)
    choices = [
        dict(zip(wanted, each, strict=True)) for each in product(*(range(min(m, 3) + 1) for m in wanted.values()))
    ]
    room = max(cost.tokens * cost.micro_batches - tokens, 0)
    best = max(rate(choice) for choice in choices if sum(choice.values()) <= room)
    probes = cost.seconds(tokens, sum(found.values())) - cost.seconds(tokens) <= PROBING * cost.seconds(tokens)
    assert rate(found) == pytest.approx(best, rel=1e-9) or probes


@given(cost=COSTS, tokens=st.integers(1, 30), sequences=st.integers(1, 6), accepted=st.lists(st.integers(0, 4)))
def test_more_where_more_is_accepted(cost: PassCost, tokens: int, sequences: int, accepted: list[int]) -> None:
    worse, better = DraftLength(4), DraftLength(4)
    for number, count in enumerate(accepted):
        for sequence in range(sequences):
            worse.observe(sequence, 4, count if number % 2 else 0)
            better.observe(sequence, 4, count)
    wanted = dict.fromkeys(range(sequences), 4)
    lengths = [sum(each.decide(cost, tokens, wanted).values()) for each in (worse, better)]
    assert worse.acceptance(0) <= better.acceptance(0) + 1e-12
    assert lengths[0] <= lengths[1] or lengths[0] <= cost.tokens  # a probe fills no more than a micro-batch


@given(tokens=st.integers(1, 15), sequences=st.integers(1, 15), wrong=st.integers(0, 10))
def test_what_a_micro_batch_has_room_for_is_free(tokens: int, sequences: int, wrong: int) -> None:
    length = learned(4, [(99, 1, 0)] * wrong)
    found = length.decide(BOUND_BY_COMPUTE, tokens, dict.fromkeys(range(sequences), 4))
    assert sum(found.values()) >= min(16 - tokens, 4 * sequences)
    assert max(found.values()) - min(found.values()) <= 1 or sum(found.values()) > 16 - tokens


@given(tokens=st.integers(1, 128), wrong=st.integers(0, 10))
def test_while_weights_are_brought_tokens_are_free(tokens: int, wrong: int) -> None:
    length = learned(8, [(0, 1, 0)] * wrong)
    found = length.decide(BOUND_BY_TRANSFER, tokens, dict.fromkeys(range(64), 8))
    assert sum(found.values()) == 128 - tokens


def test_where_computing_takes_the_time_nothing_is_drafted_but_to_see() -> None:
    length, drafted = learned(4, [(s, 4, 2) for s in range(64)]), list[int]()
    for _ in range(640):
        drafted.append(sum(length.decide(BOUND_BY_COMPUTE, 64, dict.fromkeys(range(64), 4)).values()))
    extra = sum(BOUND_BY_COMPUTE.seconds(64, count) - BOUND_BY_COMPUTE.seconds(64) for count in drafted)
    assert drafted[:15] == [0] * 15
    assert 0 < extra <= PROBING * 640 * BOUND_BY_COMPUTE.seconds(64)


def test_drafting_that_takes_longer_than_it_saves() -> None:
    slow = PassCost(16, 8, compute_seconds=0.1, transfer_seconds=1.0, draft_seconds=2.0)
    fast = PassCost(16, 8, compute_seconds=0.1, transfer_seconds=1.0, draft_seconds=0.01)
    assert DraftLength(4).decide(slow, 1, {0: 4}) == {0: 0}
    assert DraftLength(4).decide(fast, 1, {0: 4}) == {0: 4}


def test_it_finds_out_that_things_have_changed() -> None:
    """Drafts that pay when nearly all are right: first none are, then all."""
    cost, length = PassCost(1, 100, compute_seconds=0.5, transfer_seconds=0.1, overhead_seconds=1.0), DraftLength(4)
    counts = []
    for turn in range(1500):
        found = length.decide(cost, 4, dict.fromkeys(range(4), 4))
        for sequence, drafted in found.items():
            length.observe(sequence, drafted, 0 if turn < 500 else drafted)
        counts.append(sum(found.values()))
    assert sum(counts[450:500]) <= 5  # half a second each, of 50 passes of 3 seconds: a sixty-fourth
    assert counts[-1] == 16


def test_a_text_that_copies_is_drafted_for_before_others() -> None:
    length = learned(4, [(0, 4, 4), (1, 4, 0)] * 10)
    cost = PassCost(8, 1, compute_seconds=1.0, transfer_seconds=0.0)
    assert length.decide(cost, 4, {0: 4, 1: 4}) == {0: 4, 1: 0}
    length.forget(0)
    assert length.decide(cost, 4, {0: 1, 1: 4}) == {0: 1, 1: 3}


def test_what_was_right_of_one_kind_says_nothing_of_another() -> None:
    length, cost = DraftLength(4), PassCost(8, 1, compute_seconds=1.0, transfer_seconds=0.0)
    for _ in range(10):
        for kind, accepted in ((3, 4), (1, 0)):
            length.decide(cost, 4, {0: 4}, {0: kind})
            length.observe(0, 4, accepted)
    assert length.decide(cost, 4, {7: 4, 8: 4}, {7: 1, 8: 3}) == {7: 0, 8: 4}, "of texts that are new, too"
    assert length.acceptance(7) < length.acceptance(8)


def test_what_cannot_be() -> None:
    for accepted in (-1, 3):
        with pytest.raises(ValueError, match="need 0 <= accepted"):
            DraftLength(4).observe(0, 2, accepted)
    for sizes in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, -1, 1), (1, 1, float("nan"), 1), (1, 1, 0, 0)):
        with pytest.raises(ValueError, match="tokens"):
            PassCost(*sizes)
