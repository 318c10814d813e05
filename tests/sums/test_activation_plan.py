"""Chunks are as large as the bound allows, never larger, and a bound that is refused names the smallest that is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.activation_plan import CHUNK_TOKENS, MASKED, ActivationPlan, LayerShape, build_activation_plan
from tierstore.errors import PlanError

LLAMA_8B = LayerShape(4096, 14336, 4096, 2048, 128256, 2, chunked_mlp=True)

sizes = st.integers(1, 5000)
shapes = st.builds(
    LayerShape,
    hidden=sizes,
    inner=sizes,
    queries=sizes,
    keys=sizes,
    vocabulary=sizes,
    dtype_nbytes=st.sampled_from([2, 4]),
    chunked_mlp=st.booleans(),
    key_nbytes=st.sampled_from([0, 3, 40]),
    context_nbytes=st.sampled_from([0, 256]),
    fixed_nbytes=st.sampled_from([0, 10**6]),
    masked_nbytes=st.sampled_from([0, 14]),
    masked_least=st.sampled_from([0, 4096]),
)
batches, contexts = st.integers(1, 9), st.integers(0, 70_000)


def need(shape: LayerShape, plan: ActivationPlan, batch: int, context: int) -> int:
    """Bytes that live at once with such chunks."""
    tokens, mask = plan.prefill_tokens * batch, context * shape.key_nbytes
    attention = tokens * (shape.attention_nbytes + mask)
    mlp = tokens * (shape.beside_nbytes + mask) + plan.mlp_tokens * shape.inner_nbytes
    fixed = shape.fixed_nbytes + batch * (shape.logits_nbytes + context * shape.context_nbytes)
    return fixed + plan.block_nbytes + max(attention, mlp)


def planned(nbytes: int, shape: LayerShape, batch: int, context: int) -> tuple[ActivationPlan | None, int]:
    """The plan, or None and the smallest bound that has one."""
    try:
        return build_activation_plan(nbytes, shape, batch=batch, context=context), 0
    except PlanError as error:
        return None, error.needed


@settings(max_examples=60, deadline=None)
@given(shapes, batches, contexts, st.integers(0, 10**9))
def test_fills_the_bound_and_no_more(shape: LayerShape, batch: int, context: int, nbytes: int) -> None:
    plan, needed = planned(nbytes, shape, batch, context)
    if plan is None:
        assert nbytes < needed
        smallest, _ = planned(needed, shape, batch, context)
        assert smallest is not None
        assert smallest.prefill_tokens == 1
        assert need(shape, smallest, batch, context) <= needed
        return
    assert plan.prefill_tokens >= 1
    assert plan.mlp_tokens >= 1
    assert need(shape, plan, batch, context) <= nbytes
    rows = batch * plan.prefill_tokens
    assert plan.mlp_tokens <= rows
    if not shape.chunked_mlp:
        assert plan.mlp_tokens == rows
    step = CHUNK_TOKENS if plan.prefill_tokens >= CHUNK_TOKENS else 1
    least = batch * shape.masked_least * shape.masked_nbytes
    assert least <= plan.block_nbytes <= max(least, MASKED * shape.masked_nbytes)
    more = replace(plan, prefill_tokens=plan.prefill_tokens + step)
    more = replace(more, mlp_tokens=1 if shape.chunked_mlp else rows + step * batch)
    assert need(shape, more, batch, context) > nbytes
    if plan.mlp_tokens < rows:
        assert need(shape, replace(plan, mlp_tokens=plan.mlp_tokens + 1), batch, context) > nbytes


@settings(max_examples=30, deadline=None)
@given(shapes, batches, contexts, st.integers(0, 10**8), st.integers(0, 10**8))
def test_more_bytes_never_allow_fewer_tokens(
    shape: LayerShape, batch: int, context: int, nbytes: int, more: int
) -> None:
    less, _ = planned(nbytes, shape, batch, context)
    greater, _ = planned(nbytes + more, shape, batch, context)
    assert less is None or (greater is not None and greater.prefill_tokens >= less.prefill_tokens)
    assert less is None or (greater is not None and greater.block_nbytes >= less.block_nbytes)


def test_with_pages_the_context_does_not_matter() -> None:
    plans = {build_activation_plan(1 << 30, LLAMA_8B, batch=1, context=context) for context in (8192, 1 << 20)}
    (plan,) = plans
    assert plan.prefill_tokens % CHUNK_TOKENS == 0
    assert 1 <= plan.mlp_tokens < plan.prefill_tokens


def test_a_block_of_a_mask_follows_the_bound() -> None:
    paged = replace(LLAMA_8B, masked_nbytes=12, masked_least=64 * CHUNK_TOKENS)
    plain, needed = planned(0, LLAMA_8B, 1, 8192)
    assert plain is None
    assert planned(0, paged, 1, 8192) == (None, needed + 12 * 64 * CHUNK_TOKENS)
    bounds = [needed + (mib << 20) for mib in (1, 16, 64, 1024)]
    blocks = [build_activation_plan(nbytes, paged, batch=1, context=8192).block_nbytes for nbytes in bounds]
    assert blocks == sorted(set(blocks)), "a smaller bound has smaller blocks"
    assert blocks[0] < 1 << 20
    assert blocks[-1] == 12 * MASKED, "more would not be faster"


def test_the_refusal_says_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"one token of 4 rows.*raise Budget.activations to at least \d+ bytes"):
        build_activation_plan(1 << 20, LLAMA_8B, batch=4, context=100)
