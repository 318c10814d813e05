"""Attention in tiles: a query's bits depend on what it sees and on nothing else, and are near the plain statement."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from tests.torch_threads import threads
from tierstore.kernels.paged_attention.reference import attention, with_sinks
from tierstore.kernels.paged_attention.tiles import BLOCK_TOKENS, TileAttention

GARBAGE = (math.nan, math.inf, -math.inf, 3e38, -7.0)


@dataclass(frozen=True)
class Sequence_:
    """All that could be asked of one sequence: a query, a key and a value for each of its positions."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.q.shape[0]


@dataclass(frozen=True)
class Problem:
    """Sequences of one model, and how it attends."""

    sequences: list[Sequence_]
    queries: int
    kv_heads: int
    options: dict[str, Any]
    sinks: Tensor | None
    seed: int

    def alone(self, sequence: int, position: int) -> Tensor:
        """[Hq, Dv]: the result of a query that has no company at all."""
        return self.attend([(sequence, [position] + [-1] * (self.queries - 1))], self.plain_rounds([sequence]))[0, 0]

    def plain_rounds(self, sequences: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        for index in range(-(-max(self.sequences[s].length for s in sequences) // BLOCK_TOKENS)):
            yield index, [tile for tile, s in enumerate(sequences) if index * BLOCK_TOKENS < self.sequences[s].length]

    def attend(
        self,
        tiles: list[tuple[int, list[int]]],
        rounds: Any,
        rest: random.Random | None = None,
    ) -> Tensor:
        """``rounds`` say which tiles get which block; with ``rest`` what no query of a tile sees is garbage."""
        some = self.sequences[0]
        q = torch.stack([torch.stack([self.sequences[s].q[max(p, 0)] for p in places]) for s, places in tiles])
        positions = torch.tensor([places for _, places in tiles])
        found = TileAttention(q, positions, kv_heads=self.kv_heads, value_dim=some.v.shape[-1], **self.options)
        for index, chosen in rounds:
            looking = [tiles[tile] for tile in chosen]
            one = rest is not None and len({sequence for sequence, _ in looking}) == 1 and rest.random() < 0.6
            if one:  # they look at the same block, which is read once
                looking = [(looking[0][0], [p for _, places in looking for p in places])]
            keys, values = (
                torch.stack([self.block(states(self.sequences[s]), index, places, rest) for s, places in looking])
                for states in (attrgetter("k"), attrgetter("v"))
            )
            if one:
                keys, values = (t.expand(len(chosen), -1, -1, -1) for t in (keys, values))
            found.add(chosen, index, keys, values)
        return found.result(self.sinks)

    def block(self, states: Tensor, index: int, places: list[int], rest: random.Random | None) -> Tensor:
        block = states.new_zeros((BLOCK_TOKENS, *states.shape[1:]))
        here = states[index * BLOCK_TOKENS :][:BLOCK_TOKENS]
        block[: len(here)] = here
        if rest is not None:
            keys, window = torch.arange(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS), self.options["window"]
            seen = torch.zeros(BLOCK_TOKENS, dtype=torch.bool)
            for p in places:
                seen |= (keys <= p) & (keys > p - (window or 1 << 30))
            block[~seen] = rest.choice(GARBAGE)
        return block


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    seed = draw(st.integers(0, 1 << 30))
    generator, chance = Generator().manual_seed(seed), random.Random(seed)
    kv_heads, group = chance.choice([1, 2, 3]), draw(st.sampled_from([1, 2, 3, 4, 8]))
    key_dim, value_dim = draw(st.sampled_from([16, 64, 80, 96, 128, 20])), chance.choice([16, 64, 80, 128, 24])
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    queries = draw(st.sampled_from([1, 16]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    sequences = []
    for length in draw(st.lists(st.integers(1, 2 * BLOCK_TOKENS + 40), min_size=1, max_size=2)):
        shapes = (kv_heads * group, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)
        sequences.append(Sequence_(*(normal(length, *shape) for shape in shapes)))
    options = {
        "scale": 2.5 / math.sqrt(key_dim),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "window": draw(st.sampled_from([None, None, 1, 37, 300])),
    }
    sinks = normal(kv_heads * group) if draw(st.booleans()) else None
    return Problem(sequences, queries, kv_heads, options, sinks, seed)


def in_company(problem: Problem, chance: random.Random) -> tuple[list[tuple[int, list[int]]], Any]:
    """Tiles with any queries of a sequence in any order, and a random way to add their blocks."""
    tiles: list[tuple[int, list[int]]] = []
    for _ in range(chance.choice([1, 2, 3, 5, 11])):
        sequence = chance.randrange(len(problem.sequences))
        length = problem.sequences[sequence].length
        tiles.append((sequence, [chance.randrange(-1, length) for _ in range(problem.queries)]))
    rounds = []
    for index, chosen in problem.plain_rounds([sequence for sequence, _ in tiles]):
        chance.shuffle(chosen)
        while chosen:
            some = chance.randint(1, len(chosen))
            rounds.append((index, chosen[:some]))
            chosen = chosen[some:]
    return tiles, rounds


@given(problem=problems(), count=st.sampled_from([1, 1, 2, 3]))
@settings(max_examples=45, deadline=None)
def test_a_query_does_not_notice_its_company(problem: Problem, count: int) -> None:
    chance = random.Random(problem.seed)
    tiles, rounds = in_company(problem, chance)
    with threads(count):
        found = problem.attend(tiles, rounds, chance)
    asked = [(tile, slot) for tile in range(len(tiles)) for slot in range(problem.queries)]
    for tile, slot in chance.sample(asked, min(len(asked), 12)):
        sequence, places = tiles[tile]
        if places[slot] < 0:
            assert not found[tile, slot].any()
        else:
            assert torch.equal(found[tile, slot], problem.alone(sequence, places[slot]))


@given(problem=problems())
@settings(max_examples=25, deadline=None)
def test_it_is_near_the_plain_statement(problem: Problem) -> None:
    sequence, chance = problem.sequences[-1], random.Random(problem.seed)
    places = [chance.randrange(sequence.length) for _ in range(problem.queries)]
    tiles = [(len(problem.sequences) - 1, places)]
    found = problem.attend(tiles, problem.plain_rounds([tiles[0][0]]), chance)
    keys, at = torch.arange(sequence.length), torch.tensor(places)[:, None]
    seen = (keys <= at) & (keys > at - (problem.options["window"] or 1 << 30))
    q, k, v = (t.transpose(0, 1)[None] for t in (sequence.q[places], sequence.k, sequence.v))
    whole = attention(q, k, v, seen, scale=problem.options["scale"], softcap=problem.options["softcap"])
    exact = whole.out if problem.sinks is None else with_sinks(whole, problem.sinks)
    torch.testing.assert_close(found[0].double(), exact[0].transpose(0, 1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_who_sees_a_value_that_is_not_finite_gets_none_and_nobody_else(queries: int, shared: bool, odd: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(16 // queries, queries, 4, 16), torch.randn(1, 256, 2, 16), torch.randn(1, 256, 2, 32)
    positions = torch.arange(100, 116).view(-1, queries)

    def result() -> Tensor:
        found = TileAttention(q, positions, kv_heads=2, value_dim=32, scale=0.25)
        blocks = [t.expand(len(q), -1, -1, -1) if shared else t.repeat(len(q), 1, 1, 1) for t in (k, v)]
        found.add(range(len(q)), 0, *blocks)
        return found.result().flatten(0, 1)

    clean = result()
    v[0, 107, 1, 5] = odd
    found, expected = result(), torch.zeros(16, 4, 32, dtype=torch.bool)
    expected[7:, 2:, 5] = True
    assert torch.equal(found.isnan(), expected)
    assert torch.equal(found[~expected], clean[~expected])


def test_a_block_that_nobody_sees_changes_no_bit() -> None:
    torch.manual_seed(0)
    q, positions = torch.randn(2, 16, 2, 16), torch.arange(300, 332).view(2, 16)
    k, v = torch.randn(2, 2, 256, 1, 16), torch.randn(2, 2, 256, 1, 16)
    with_all, with_least = (TileAttention(q, positions, kv_heads=1, value_dim=16, scale=1.0, window=60) for _ in "ab")
    with_all.add([0, 1], 0, k[0], v[0])
    with_least.add([0], 0, k[0][:1], v[0][:1])  # positions 316 and above see nothing below 257
    for each in (with_all, with_least):
        each.add([0, 1], 1, k[1], v[1])
    with_all.add([1, 0], 2, torch.full_like(k[0], math.nan), torch.full_like(v[0], math.nan))
    assert torch.equal(with_all.result(), with_least.result())


def test_nothing_was_added() -> None:
    found = TileAttention(torch.randn(1, 2, 2, 16), torch.tensor([[3, -1]]), kv_heads=1, value_dim=8, scale=1.0)
    assert torch.equal(found.result(torch.zeros(2)), torch.zeros(1, 2, 2, 8))


def test_what_does_not_belong_together() -> None:
    q, positions = torch.randn(2, 1, 4, 16), torch.zeros(2, 1, dtype=torch.int64)
    k, v = torch.randn(2, 256, 2, 16), torch.randn(2, 256, 2, 8)

    def make(**changed: Any) -> TileAttention:
        given = {"positions": positions, "kv_heads": 2, "value_dim": 8, "scale": 1.0, **changed}
        return TileAttention(q, given.pop("positions"), **given)

    for changed in ({"positions": positions[:1]}, {"kv_heads": 3}, {"kv_heads": 0}, {"window": 0}):
        with pytest.raises(ValueError, match=r"need|sees"):
            make(**changed)
    for tiles, keys, values in (([0], k, v), ([0, 1], k[:, :100], v), ([0, 1], k, k), ([0, 2], k, v), ([1, 1], k, v)):
        with pytest.raises(ValueError, match=r"need|once"):
            make().add(tiles, 0, keys, values)
    found = make()
    found.add([0, 1], 1, k, v)
    with pytest.raises(ValueError, match="behind the last"):
        found.add([0, 1], 1, k, v)
