"""Drafts: what is looked up, and that no more and no less is drafted than pays."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.drafting import BY_MODEL, LONGEST, PROBED_TOKENS, PROBING, DraftLength, Lookup, Offer, PassCost

FEW_TOKENS = st.lists(st.integers(0, 3), max_size=40)
SECONDS = st.sampled_from([0.0, 0.1, 1.0, 3.0])
COSTS = st.builds(PassCost, st.integers(1, 20), st.integers(1, 5), SECONDS, SECONDS, st.just(0.05), SECONDS)
LOOKED_UP = st.builds(Offer, st.integers(0, 6), st.integers(1, LONGEST))
MODELLED = st.builds(Offer, st.integers(1, 6), st.just(BY_MODEL), SECONDS)
OFFERS = st.one_of(
    LOOKED_UP.map(lambda offer: [offer]), MODELLED.map(lambda offer: [offer]), st.tuples(LOOKED_UP, MODELLED).map(list)
)
OFFERED = st.dictionaries(st.integers(0, 9), OFFERS, max_size=6)
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


def learned(tried: list[tuple[int, int, int, int]]) -> DraftLength:
    length = DraftLength()
    for sequence, kind, drafted, accepted in tried:
        length.observe(sequence, kind, drafted, accepted)
    return length


def looked_up(sequences: int, most: int) -> dict[int, list[Offer]]:
    """Each can have ``most`` tokens for nothing."""
    return {sequence: [Offer(most, 1)] for sequence in range(sequences)}


def modelled(sequences: int, most: int) -> dict[int, list[Offer]]:
    return {sequence: [Offer(most, BY_MODEL)] for sequence in range(sequences)}


def tokens_of(taken: dict[int, Offer]) -> int:
    return sum(offer.tokens for offer in taken.values())


TRIED = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, LONGEST), st.integers(0, 8), st.integers(0, 8)).map(
        lambda t: (t[0], t[1], max(t[2:]), min(t[2:]))
    ),
    max_size=30,
)


@given(cost=COSTS, tokens=st.integers(0, 120), offers=OFFERED, tried=TRIED)
def test_never_beyond_what_there_is(
    cost: PassCost, tokens: int, offers: dict[int, list[Offer]], tried: list[tuple[int, int, int, int]]
) -> None:
    length = learned(tried)
    for _ in range(3):
        found = length.decide(cost, tokens, offers)
        for sequence, offer in found.items():
            there = {each.kind: each.tokens for each in offers[sequence]}
            assert 1 <= offer.tokens <= there[offer.kind]
        assert tokens_of(found) <= max(cost.tokens * cost.micro_batches - tokens, 0)
        assert all(0 < length.acceptance(sequence, kind) < 1 for sequence in offers for kind in range(LONGEST + 1))


def rate(length: DraftLength, cost: PassCost, tokens: int, taken: dict[int, Offer]) -> float:
    """Tokens per second, by the definition."""
    right = sum(length.acceptance(s, o.kind) ** nth for s, o in taken.items() for nth in range(1, o.tokens + 1))
    by_model = [offer for offer in taken.values() if offer.kind == BY_MODEL and offer.tokens]
    seconds = cost.seconds(tokens + tokens_of(taken), max((offer.tokens for offer in by_model), default=0))
    return (tokens + right) / (seconds + sum(offer.begin_seconds for offer in by_model))


@given(
    cost=COSTS,
    tokens=st.integers(1, 30),
    offers=st.dictionaries(st.integers(0, 9), LOOKED_UP.map(lambda offer: [offer]), max_size=3)
    | st.dictionaries(st.integers(0, 9), st.tuples(LOOKED_UP, MODELLED).map(list), max_size=1),
    tried=TRIED,
)
@settings(max_examples=60)
def test_no_other_choice_is_expected_to_be_faster(
    cost: PassCost, tokens: int, offers: dict[int, list[Offer]], tried: list[tuple[int, int, int, int]]
) -> None:
    """Where there is one text, or nothing but looked-up tokens; but for what a probe of a model may cost."""
    length = learned(tried)
    room = max(cost.tokens * cost.micro_batches - tokens, 0)
    choices = [[replace(o, tokens=n) for o in theirs for n in range(o.tokens + 1)] for theirs in offers.values()]
    tables = [dict(zip(offers, each, strict=True)) for each in product(*choices)]
    best = max(rate(length, cost, tokens, taken) for taken in tables if tokens_of(taken) <= room)
    taken = length.decide(cost, tokens, offers)
    found = rate(length, cost, tokens, taken)
    if any(offer.kind == BY_MODEL for offer in taken.values()):
        assert (1 - PROBING) * best <= found * (1 + 1e-9)
    else:
        assert found == pytest.approx(best, rel=1e-9)


def test_a_probe_that_takes_no_time_is_no_reason_to_leave_better_ones() -> None:
    cost, offers = PassCost(1, 16, 0.0, 0.05), {0: [Offer(8, 3), Offer(1, BY_MODEL)]}
    length = learned([(0, 3, 8, 8)] * 20 + [(0, BY_MODEL, 1, 0)] * 20)
    kinds = [length.decide(cost, 1, offers)[0].kind for _ in range(64)]
    assert 0 < kinds.count(BY_MODEL) < 4


@given(cost=COSTS, tokens=st.integers(1, 30), sequences=st.integers(1, 6), accepted=st.lists(st.integers(0, 4)))
def test_more_where_more_is_accepted(cost: PassCost, tokens: int, sequences: int, accepted: list[int]) -> None:
    worse, better = DraftLength(), DraftLength()
    for number, count in enumerate(accepted):
        for sequence in range(sequences):
            worse.observe(sequence, 1, 4, count if number % 2 else 0)
            better.observe(sequence, 1, 4, count)
    lengths = [tokens_of(each.decide(cost, tokens, looked_up(sequences, 4))) for each in (worse, better)]
    assert worse.acceptance(0, 1) <= better.acceptance(0, 1) + 1e-12
    assert lengths[0] <= lengths[1]


@given(tokens=st.integers(1, 15), sequences=st.integers(1, 15), wrong=st.integers(0, 10))
def test_what_a_micro_batch_has_room_for_is_free(tokens: int, sequences: int, wrong: int) -> None:
    found = learned([(99, 1, 1, 0)] * wrong).decide(BOUND_BY_COMPUTE, tokens, looked_up(sequences, 4))
    lengths = [found[sequence].tokens if sequence in found else 0 for sequence in range(sequences)]
    assert sum(lengths) >= min(16 - tokens, 4 * sequences)
    assert max(lengths) - min(lengths) <= 1 or sum(lengths) > 16 - tokens


@given(tokens=st.integers(1, 128), wrong=st.integers(0, 10))
def test_while_weights_are_brought_tokens_are_free(tokens: int, wrong: int) -> None:
    length = learned([(0, 1, 1, 0)] * wrong)
    assert tokens_of(length.decide(BOUND_BY_TRANSFER, tokens, looked_up(64, 8))) == 128 - tokens


def test_where_computing_takes_the_time_a_model_drafts_but_to_see() -> None:
    cost = replace(BOUND_BY_COMPUTE, step_seconds=0.1)
    length, extra = learned([(s, BY_MODEL, 4, 2) for s in range(64)]), list[float]()
    for _ in range(960):
        found = length.decide(cost, 64, modelled(64, 8))
        assert len(found) <= 1
        steps = max((offer.tokens for offer in found.values()), default=0)
        assert steps in (0, PROBED_TOKENS)
        extra.append(cost.seconds(64 + tokens_of(found), steps) - cost.seconds(64))
    assert extra[:15] == [0] * 15
    assert 0 < sum(extra) <= PROBING * 960 * cost.seconds(64)
    assert not any(length.decide(cost, 64, looked_up(64, 4)) for _ in range(99)), "what is looked up is seen anyway"


def test_a_model_that_takes_longer_than_it_saves() -> None:
    slow = PassCost(16, 8, compute_seconds=0.1, transfer_seconds=1.0, step_seconds=2.0)
    assert DraftLength().decide(slow, 1, modelled(1, 4)) == {}
    fast = replace(slow, step_seconds=0.01)
    assert tokens_of(DraftLength().decide(fast, 1, modelled(1, 4))) == 4
    assert DraftLength().decide(fast, 1, {0: [Offer(4, BY_MODEL, begin_seconds=9.0)]}) == {}, "not for a long prompt"


def test_a_step_of_a_model_serves_all_texts() -> None:
    cost = PassCost(16, 8, compute_seconds=0.1, transfer_seconds=1.0, step_seconds=0.6)
    assert DraftLength().decide(cost, 1, modelled(1, 4)) == {0: Offer(1, BY_MODEL)}
    assert DraftLength().decide(cost, 101, modelled(27, 4)) == {}, "few of many tokens"
    assert tokens_of(DraftLength().decide(cost, 27, modelled(27, 4))) == 27


@pytest.mark.parametrize(("found", "kind"), [(9, 1), (0, BY_MODEL)])
def test_a_model_drafts_where_what_is_looked_up_is_worse(found: int, kind: int) -> None:
    length = learned([(7, 1, 9, found)] * 5 + [(7, BY_MODEL, 9, 6)] * 5)
    cost = PassCost(16, 8, compute_seconds=0.1, transfer_seconds=1.0, step_seconds=0.1)
    (offer,) = length.decide(cost, 1, {0: [Offer(4, 1), Offer(4, BY_MODEL)]}).values()
    assert offer.kind == kind


def test_it_finds_out_that_a_model_has_become_better() -> None:
    """Drafts that pay when nearly all are right: first none are, then all."""
    cost = PassCost(1, 100, compute_seconds=0.5, transfer_seconds=0.1, overhead_seconds=1.0, step_seconds=0.1)
    length, counts = DraftLength(), list[int]()
    for turn in range(3000):
        found = length.decide(cost, 4, modelled(4, 4))
        for sequence, offer in found.items():
            length.observe(sequence, BY_MODEL, offer.tokens, 0 if turn < 500 else offer.tokens)
        counts.append(tokens_of(found))
    assert sum(counts[400:500]) <= 2 * PROBED_TOKENS
    assert counts[-1] == 16


def test_a_text_that_copies_is_drafted_for_before_others() -> None:
    length = learned([(0, 1, 4, 4), (1, 1, 4, 0)] * 10)
    cost = PassCost(8, 1, compute_seconds=1.0, transfer_seconds=0.0)
    assert length.decide(cost, 4, looked_up(2, 4)) == {0: Offer(4, 1)}
    length.forget(0)
    assert length.decide(cost, 4, {0: [Offer(1, 1)], 1: [Offer(4, 1)]}) == {0: Offer(1, 1), 1: Offer(3, 1)}


def test_what_was_right_of_one_kind_says_nothing_of_another() -> None:
    length, cost = DraftLength(), PassCost(8, 1, compute_seconds=1.0, transfer_seconds=0.0)
    for _ in range(10):
        length.observe(0, 3, 4, 4)
        length.observe(0, 1, 4, 0)
    assert length.acceptance(7, 1) < length.acceptance(8, 3), "of texts that are new, too"
    assert length.decide(cost, 4, {7: [Offer(4, 1)], 8: [Offer(4, 3)]}) == {8: Offer(4, 3)}


def test_what_cannot_be() -> None:
    for accepted in (-1, 3):
        with pytest.raises(ValueError, match="need 0 <= accepted"):
            DraftLength().observe(0, 1, 2, accepted)
    for sizes in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, -1, 1), (1, 1, float("nan"), 1), (1, 1, 0, 0)):
        with pytest.raises(ValueError, match="tokens"):
            PassCost(*sizes)
