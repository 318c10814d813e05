"""Packing with error feedback: never worse where it counts, much better on inputs that belong together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.formats.feedback import DAMPING, output_errors, pack_with_feedback
from tierstore.formats.format import Format, Parts
from tierstore.formats.grids import grid_of
from tierstore.formats.named import FORMATS

NAMES = [name for name in FORMATS if name != "bf16"]
SLACK = 1e-5
"""For sums of squares in float32, which may be a little below 0."""


def matrices(n: int, k: int, seed: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A matrix [n, k], and ``X^T X`` of inputs that depend on each other and differ in size."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, k, generator=random)
    inputs = torch.randn(tokens or 4 * k, k, generator=random) @ torch.randn(k, k, generator=random)
    inputs *= torch.rand(k, generator=random) * 3
    return weights, inputs.T @ inputs


def same(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(part.view(torch.uint8), other[name].view(torch.uint8)) for name, part in one.items()
    )


def check_no_row_is_worse(form: Format, weights: Tensor, gram: Tensor) -> None:
    n, k = weights.shape
    found = pack_with_feedback(form, weights, gram)
    for spec in form.parts(n, k):
        assert (str(found[spec.name].dtype)[6:], tuple(found[spec.name].shape)) == (spec.dtype, spec.shape)
    assert same(found, pack_with_feedback(form, weights, gram))
    before, after = (output_errors(form, parts, weights, gram) for parts in (form.pack(weights), found))
    assert (after <= before + SLACK * before.abs()).all()


# Laws


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 70), k=st.integers(1, 140), seed=st.integers(0, 99), tokens=st.sampled_from([1, 7, 500]))
def test_no_rows_output_gets_worse(name: str, n: int, k: int, seed: int, tokens: int) -> None:
    check_no_row_is_worse(FORMATS[name], *matrices(n, k, seed, tokens))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=10)
@given(n=st.integers(1, 70), k=st.integers(1, 140), seed=st.integers(0, 99))
def test_no_row_gets_worse_where_inputs_have_nothing_in_common(name: str, n: int, k: int, seed: int) -> None:
    check_no_row_is_worse(FORMATS[name], matrices(n, k, seed)[0], torch.eye(k))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 256), (70, 300)])
def test_inputs_that_belong_together_make_up_for_each_other(name: str, shape: tuple[int, int]) -> None:
    form, (weights, gram) = FORMATS[name], matrices(*shape, seed=1)
    before, after = (
        output_errors(form, parts, weights, gram).sum()
        for parts in (form.pack(weights), pack_with_feedback(form, weights, gram))
    )
    assert after < 0.6 * before


@pytest.mark.parametrize("name", NAMES)
def test_what_holds_on_some_inputs_holds_on_others_like_them(name: str) -> None:
    form = FORMATS[name]
    weights, both = matrices(32, 64, seed=3, tokens=2000)
    random = torch.Generator().manual_seed(4)
    factor = torch.linalg.cholesky(both)
    seen, unseen = (torch.randn(1000, 64, generator=random) @ factor.T for _ in range(2))
    before, after = (
        output_errors(form, parts, weights, unseen.T @ unseen).sum()
        for parts in (form.pack(weights), pack_with_feedback(form, weights, seen.T @ seen))
    )
    assert after < 0.6 * before


def by_the_paper(weights: Tensor, scales: Tensor, gram: Tensor, damping: float) -> Tensor:
    """int8 codes with one scale a row, by Frantar et al. 2022, algorithm 1, in blocks of one column, in float64."""
    order = gram.diagonal().argsort(descending=True)
    left, damped = weights.double()[:, order], gram.double()[order][:, order]
    damped += torch.eye(len(damped)) * damping * damped.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes = torch.empty_like(left)
    for column in range(len(gram)):
        codes[:, column] = (left[:, column] / scales).round().clamp(-128, 127)
        error = (left[:, column] - codes[:, column] * scales) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
    return codes[:, order.argsort()]


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_those_of_the_paper(seed: int) -> None:
    form, (weights, gram) = FORMATS["int8-row"], matrices(48, 200, seed)
    found = pack_with_feedback(form, weights, gram)
    expected = by_the_paper(weights, form.pack(weights)["scales"].double()[:, 0], gram, DAMPING)
    assert (found["codes"] == expected).float().mean() > 0.99  # the rest is rounding in float32, and what follows


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_of_inputs_does_not_matter(name: str) -> None:
    weights, gram = matrices(20, 150, seed=5)
    found = pack_with_feedback(FORMATS[name], weights, gram)
    assert same(found, pack_with_feedback(FORMATS[name], weights, gram * 2.0**60))
    assert same(found, pack_with_feedback(FORMATS[name], weights, gram * 2.0**-60))


# Edges


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_made_up_for_without_inputs(name: str) -> None:
    form, (weights, gram) = FORMATS[name], matrices(10, 70, seed=6)
    assert same(pack_with_feedback(form, weights, gram * 0), form.pack(weights))


def test_a_format_without_scales_stays_as_it_is() -> None:
    weights, gram = matrices(10, 70, seed=6)
    assert same(pack_with_feedback(FORMATS["bf16"], weights, gram), FORMATS["bf16"].pack(weights))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_always_zero(name: str) -> None:
    form, (weights, gram) = FORMATS[name], matrices(10, 200, seed=7)
    dead = torch.arange(200) % 3 == 0
    gram[dead] = 0
    gram[:, dead] = 0
    check_no_row_is_worse(form, weights, gram)
    if not name.startswith("int4"):  # whose scales then suit the others
        found, plain = (
            form.unpack(parts, 10, 200) for parts in (pack_with_feedback(form, weights, gram), form.pack(weights))
        )
        assert torch.equal(found[:, dead], plain[:, dead])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [1e-6, 1e6])
def test_inputs_of_very_different_sizes(name: str, spread: float) -> None:
    weights, gram = matrices(8, 130, seed=8)
    sizes = torch.logspace(0, 1, 130).pow(torch.tensor(spread).log10())
    check_no_row_is_worse(FORMATS[name], weights, gram * sizes[:, None] * sizes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (1, 1), (64, 128), (65, 129)])
def test_shapes_at_the_edges(name: str, n: int, k: int) -> None:
    check_no_row_is_worse(FORMATS[name], *matrices(n, k, seed=9, tokens=300))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e-30, 1e30])
def test_rows_that_are_all_one_value(name: str, value: float) -> None:
    form, (weights, gram) = FORMATS[name], matrices(5, 100, seed=10)
    weights[2] = value
    found = form.unpack(pack_with_feedback(form, weights, gram), 5, 100)
    assert found.isfinite().all()
    check_no_row_is_worse(form, weights[[0, 1, 3, 4]], gram)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weights, gram = matrices(10, 70, seed=11)
    weights = weights.to(dtype)
    found = pack_with_feedback(FORMATS["int4"], weights, gram)
    assert same(found, pack_with_feedback(FORMATS["int4"], weights.float(), gram))
    check_no_row_is_worse(FORMATS["int4"], weights, gram.double())


def test_what_is_given_is_not_changed() -> None:
    weights, gram = matrices(10, 70, seed=12)
    before = weights.clone(), gram.clone()
    pack_with_feedback(FORMATS["int4"], weights, gram)
    assert torch.equal(weights, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (10, 70), (64, 128)])
def test_grids_say_what_the_parts_say(name: str, n: int, k: int) -> None:
    form = FORMATS[name]
    parts = form.pack(matrices(n, k, seed=13)[0])
    grid = grid_of(form, parts, n, k)
    assert grid is not None
    assert same(grid.encoded(grid.codes), parts)
    values = grid.values(grid.codes, torch.arange(k)).T
    torch.testing.assert_close(values, form.unpack(parts, n, k), rtol=1e-6, atol=0)
    assert torch.equal(grid.rounded(values.T.clone(), torch.arange(k)), grid.codes)


# What is refused


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(value: float) -> None:
    weights, gram = matrices(10, 70, seed=14)
    weights[3, 4] = value
    with pytest.raises(ModuleError, match="finite"):
        pack_with_feedback(FORMATS["int4"], weights, gram)
    weights, gram = matrices(10, 70, seed=14)
    gram[3, 4] = value
    with pytest.raises(ModuleError, match="overflow"):
        pack_with_feedback(FORMATS["int4"], weights, gram)


@pytest.mark.parametrize("gram", [torch.eye(69), torch.eye(70, dtype=torch.float16), torch.eye(70)[:, :69]])
def test_products_of_other_inputs(gram: Tensor) -> None:
    with pytest.raises(ModuleError, match=r"\(70, 70\) is needed"):
        pack_with_feedback(FORMATS["int4"], matrices(10, 70, seed=15)[0], gram)


def test_what_is_no_sum_of_squares() -> None:
    gram = torch.ones(70, 70) * 1e3 - torch.eye(70) * 999
    gram[0, 1] = gram[1, 0] = -1e6
    with pytest.raises(ModuleError, match=r"X\^T X"):
        pack_with_feedback(FORMATS["int4"], matrices(10, 70, seed=16)[0], gram)
