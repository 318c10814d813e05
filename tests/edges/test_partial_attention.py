"""Laws of attention over parts of the keys, and every part beside the plain statement in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from tierstore.kernels.paged_attention import partial as module
from tierstore.kernels.paged_attention.partial import Partial, combine, merge, partial, shared
from tierstore.kernels.paged_attention.reference import attention, with_sinks

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
FEW_KEYS = 16
FEW_OR_MANY = st.one_of(st.integers(0, 5), st.integers(100, 300))


@dataclass(frozen=True)
class Problem:
    """Random queries, keys and values, and a mask or none."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap}

    def keys(self, there: slice) -> Problem:
        mask = None if self.mask is None else self.mask.expand(*self.mask.shape[:-1], self.k.shape[2])[..., there]
        return Problem(self.q, self.k[:, :, there], self.v[:, :, there], mask, **self.options)

    def partial(self) -> Partial:
        return partial(self.q, self.k, self.v, self.mask, **self.options)

    def exact(self) -> Partial:
        return attention(self.q, self.k, self.v, self.mask, **self.options)


@st.composite
def problems(draw: st.DrawFn, *, keys: st.SearchStrategy[int] = FEW_OR_MANY) -> Problem:
    generator = Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype = draw(st.sampled_from([*TOLERANCE]))
    rows, queries = draw(st.integers(0, 3)), draw(st.one_of(st.integers(0, 4), st.just(20)))
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    count = draw(keys)
    key_dim = draw(st.sampled_from([1, 5, 16, 20]))
    value_dim = draw(st.sampled_from([key_dim, 8, 24]))
    token_major = draw(st.booleans())

    def states(dim: int) -> Tensor:
        made = normal(rows, count, heads, dim) if token_major else normal(rows, heads, count, dim).transpose(1, 2)
        return made.to(dtype).transpose(1, 2)

    mask = None
    if draw(st.booleans()):
        sizes = (rows, heads * group, queries, count)
        shape = [draw(st.sampled_from([1, size])) for size in sizes]
        mask = normal(*shape) > draw(st.sampled_from([0.0, 1.0]))
        if draw(st.booleans()):
            mask = normal(*shape).masked_fill(~mask, -math.inf).to(draw(st.sampled_from([dtype, torch.float32])))
        mask = mask[(0,) * draw(st.integers(0, 2))] if mask.shape[:2] == (1, 1) else mask
    q = normal(rows, queries, heads * group, key_dim).to(dtype).transpose(1, 2)
    softcap = draw(st.sampled_from([None, None, 2.0]))
    return Problem(q, states(key_dim), states(value_dim), mask, draw(st.sampled_from([0.3, 1.0])), softcap)


def same(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def same_part(found: Partial, exact: Partial, dtype: torch.dtype) -> None:
    same(found.out, exact.out, dtype)
    same(found.lse, exact.lse, dtype)


laws = settings(deadline=None, max_examples=40, report_multiple_bugs=False)


@laws
@given(problems())
def test_a_part_is_what_the_plain_statement_says(problem: Problem) -> None:
    same_part(problem.partial(), problem.exact(), problem.q.dtype)


@laws
@given(problems(), st.lists(st.integers(0, 300), max_size=4), st.randoms(use_true_random=False))
def test_parts_merge_to_the_whole_in_any_order(problem: Problem, cuts: list[int], order: Any) -> None:
    count, exact = problem.k.shape[2], problem.exact()
    bounds = sorted([0, count, *(min(cut, count) for cut in cuts)])
    parts = [problem.keys(slice(*pair)).partial() for pair in pairwise(bounds)]
    before = [(part.out.clone(), part.lse.clone()) for part in parts]
    order.shuffle(parts)
    same_part(combine(parts), exact, problem.q.dtype)
    sinks = torch.linspace(-2, 3, problem.q.shape[1])
    same(merge(parts), exact.out, problem.q.dtype)
    same(merge(parts, sinks), with_sinks(exact, sinks), problem.q.dtype)
    assert all(any(torch.equal(part.out, out) for part in parts) for out, _ in before), "merging changed a part"


@laws
@given(problems(keys=st.integers(1, 40)))
def test_what_is_masked_vanishes(problem: Problem) -> None:
    part = problem.partial()
    nothing = Partial(torch.zeros_like(part.out), torch.full_like(part.lse, -math.inf))
    hidden = partial(
        problem.q, problem.k, problem.v, torch.zeros(problem.k.shape[2], dtype=torch.bool), **problem.options
    )
    for found, wanted in ((hidden, nothing), (combine([nothing, part, hidden]), part), (combine([nothing]), nothing)):
        assert torch.equal(found.out, wanted.out)
        torch.testing.assert_close(found.lse, wanted.lse, atol=1e-6, rtol=1e-6)
    assert not merge([hidden, nothing], torch.zeros(problem.q.shape[1])).any()


@laws
@given(problems(keys=st.integers(1, 40)))
def test_grouped_heads_are_repeated_heads(problem: Problem) -> None:
    group = problem.q.shape[1] // problem.k.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (problem.k, problem.v))
    same_part(problem.partial(), partial(problem.q, keys, values, problem.mask, **problem.options), problem.q.dtype)


@laws
@given(problems(keys=st.integers(0, 40)))
def test_rows_that_share_keys_are_rows_that_have_the_same_keys(problem: Problem) -> None:
    if problem.q.shape[0] == 0:
        return
    keys, values = problem.k[:1], problem.v[:1]
    found = shared(problem.q, keys, values, problem.mask, **problem.options)
    keys, values = (t.expand(problem.q.shape[0], -1, -1, -1) for t in (keys, values))
    same_part(found, attention(problem.q, keys, values, problem.mask, **problem.options), problem.q.dtype)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "queries"), [(1, 1), (1, 3), (2, 1), (2, 40)])
def test_keys_are_taken_in_blocks(
    monkeypatch: pytest.MonkeyPatch, rows: int, queries: int, dtype: torch.dtype, softcap: float | None
) -> None:
    """More blocks than are kept apart before they are added up; and, of one row, more than there are cores."""
    for name in ("_FLOATS", "SCORES", "_LEAST", "_LEAST_SHARE"):
        monkeypatch.setattr(module, name, FEW_KEYS)
    generator = Generator().manual_seed(0)
    q = torch.randn(rows, 4, queries, 8, generator=generator).to(dtype)
    k, v = (torch.randn(rows, FEW_KEYS * 20 + 3, 2, 8, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    mask = torch.rand(rows, 1, queries, k.shape[2], generator=generator) > 0.5
    mask[0, 0, 0, FEW_KEYS:] = False
    for each in (None, mask):
        problem = Problem(q, k, v, each, 1.0, softcap)
        same_part(problem.partial(), problem.exact(), dtype)


def test_scores_of_any_size_are_right() -> None:
    """Exponentials of such scores are beyond every float; some are 0 beside others."""
    k = torch.tensor([[[[300.0], [299.0], [-1000.0]]]])
    v = torch.tensor([[[[1.0], [2.0], [3.0]]]])
    for sign in (1.0, -1.0):
        whole = Problem(torch.full((1, 1, 1, 1), sign), k, v, None, 1.0, None)
        parts = [whole.keys(slice(i, i + 1)).partial() for i in range(3)]
        same(merge(parts), whole.exact().out, torch.float32)
        same_part(whole.partial(), whole.exact(), torch.float32)


def test_a_row_whose_exponentials_add_to_one_is_not_taken_for_an_empty_one() -> None:
    q, v = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 1, 4)
    part = partial(q, v, v, torch.tensor([[True], [False]]), scale=1.0)
    assert part.lse.tolist() == [[[0.0, -math.inf]]]
    assert part.out.tolist() == [[[[1.0] * 4, [0.0] * 4]]]


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "need"),
    [
        (made(1, 3, 1, 4), made(1, 2, 5, 4), made(1, 2, 5, 4), None, "multiple of the heads"),
        (made(1, 2, 1, 4), made(1, 0, 5, 4), made(1, 0, 5, 4), None, "multiple of the heads"),
        (made(1, 2, 1, 4), made(2, 2, 5, 4), made(2, 2, 5, 4), None, "the same rows"),
        (made(1, 2, 1, 4), made(1, 2, 5, 3), made(1, 2, 5, 4), None, "the same rows and head_dim"),
        (made(1, 2, 1, 4), made(1, 2, 5, 4), made(1, 2, 6, 4), None, "rows, heads and tokens"),
        (made(1, 2, 1, 4), made(1, 2, 5, 4), made(1, 2, 5, 4).bfloat16(), None, "one floating dtype"),
        (made(1, 2, 4), made(1, 2, 5, 4), made(1, 2, 5, 4), None, "4 dimensions"),
        (made(1, 2, 3, 4), made(1, 2, 5, 4), made(1, 2, 5, 4), made(2, 5), "cannot be broadcast"),
    ],
)
def test_what_does_not_belong_together_is_refused(q: Tensor, k: Tensor, v: Tensor, mask: Any, need: str) -> None:
    with pytest.raises(ValueError, match=need):
        partial(q, k, v, mask, scale=1.0)


def test_only_one_copy_of_keys_is_shared() -> None:
    with pytest.raises(ValueError, match="use partial"):
        shared(made(2, 2, 1, 4), made(2, 2, 5, 4), made(2, 2, 5, 4), scale=1.0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (5, 5), (128, 24)])
@pytest.mark.parametrize(("queries", "count"), [(1, 1), (3, 77), (70, 1000)])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_part_on_the_card(
    queries: int,
    count: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    masked: torch.dtype | None,
    softcap: float | None,
) -> None:
    """Also queries that see no key, and keys that are token-major."""
    generator = Generator("cuda").manual_seed(queries)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2)

    q, k, v = normal(2, queries, 6, dims[0]), normal(2, count, 3, dims[0]), normal(2, count, 3, dims[1])
    mask = torch.rand(2, 1, queries, count, generator=generator, device="cuda") > 0.5
    mask[0, :, -1] = False
    added = torch.zeros(mask.shape, device="cuda").masked_fill_(~mask, -math.inf)
    problem = Problem(q, k, v, None if masked is None else mask if masked is torch.bool else added, 0.3, softcap)
    same_part(problem.partial(), problem.exact(), dtype)
