"""The kernels against float64 products: interpreted on any machine, compiled for several cards, and run on one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from tests.edges.compiler import compiled
from tests.edges.interpreter import Interpreter
from tests.edges.products import CASES, compare, normal

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

Matmul = Callable[..., Tensor]
NARROW, HALF, WIDE = torch.bfloat16, torch.float16, torch.float32


SHAPES = [
    (0, 65, 64, NARROW),
    (5, 0, 64, HALF),
    (2, 63, 0, WIDE),
    (1, 1, 1, WIDE),
    (1, 65, 200, NARROW),
    (1, 128, 31, HALF),
    (2, 64, 65, HALF),
    (5, 200, 64, NARROW),
    (16, 63, 200, WIDE),
    (17, 200, 31, NARROW),
    (64, 1, 65, NARROW),
    (70, 130, 200, HALF),
    (70, 66, 64, WIDE),
    (1, 63, 2100, NARROW),  # the columns of this one and the next are split
    (3, 65, 520, HALF),
]
"""Rows of the input, rows of the weights, columns, and the input's dtype."""

ON_THE_CARD = [
    *[shape for shape in SHAPES if 0 in shape[:3]],
    (1, 65, 2100, HALF),
    (17, 65, 200, HALF),
    (5, 64, 512, WIDE),
    (1, 4096, 4096, NARROW),
    (16, 4096, 4096, NARROW),
    (300, 4096, 4096, NARROW),
    (1, 8192, 28672, NARROW),
    (100, 8192, 28672, NARROW),
]
"""Few kinds of sizes, since one kernel is compiled for each of them: those that 16 divides, and others."""


def check(matmul: Matmul, name: str, m: int, n: int, k: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """That the product of random numbers is right."""
    case, generator = CASES[name], Generator(device).manual_seed(m + n + k)
    parts = case.parts(n, k, generator)
    x = normal(generator, m, k).to(dtype)
    compare(case, matmul(case.operation, x, *parts, n, *case.more), x, parts, n)


def check_codes(matmul: Matmul, m: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """That each code of a small float is exactly the number that torch says it is, or none where it is none.

    On a GPU what is less than the least normal float32 may be taken for 0.
    """

    def same(product: Tensor, column: Tensor) -> None:
        expected = column.float().to(dtype).T.expand(product.shape)
        assert torch.equal(product.isnan(), expected.isnan())
        least = 0.0 if device == "cpu" else torch.finfo(WIDE).tiny
        kept = expected.abs() >= least
        assert torch.equal(product[kept], expected[kept])
        assert bool((product[~kept & ~expected.isnan()].abs() < least).all())

    every = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    e4m3_codes, e8m0_codes = every.view(torch.float8_e4m3fn), every.view(torch.float8_e8m0fnu)
    first, ones = torch.ones(m, 1, dtype=dtype, device=device), torch.ones(256, 1, device=device)
    same(matmul("fp8_matmul", first, e4m3_codes, ones, 256), e4m3_codes)
    first = torch.nn.functional.pad(first, (0, 31))
    same(matmul("mxfp4_matmul", first, torch.full_like(every, 2).repeat(1, 16), e8m0_codes, 256), e8m0_codes)
    parts = every[:16].repeat(1, 16), torch.full_like(every[:16], 127).view(torch.float8_e8m0fnu)
    same(matmul("mxfp4_matmul", first, *parts, 16), CASES["mxfp4"].unpack(parts, 16, 1))


def check_rows_apart(matmul: Matmul, name: str, device: str = "cpu") -> None:
    """That ``x`` may be a part of a wider tensor, or lie the other way round, and that it is left as it was."""
    case, generator = CASES[name], Generator(device).manual_seed(0)
    parts = case.parts(65, 70, generator)
    for x in (normal(generator, 3, 200)[:, 7:77], normal(generator, 70, 3).T):
        assert not x.is_contiguous()
        before = x.clone()
        product = matmul(case.operation, x, *parts, 65, *case.more)
        assert torch.equal(x, before)
        compare(case, product, x, parts, 65)


@pytest.fixture(scope="module")
def interpreted(interpreter: Interpreter) -> Matmul:
    return interpreter.matmul


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("m", "n", "k", "dtype"), SHAPES)
def test_product(interpreted: Matmul, name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(interpreted, name, m, n, k, dtype)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from([*CASES]),
    m=st.integers(1, 20),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    dtype=st.sampled_from([NARROW, HALF, WIDE]),
)
@example(name="int4-g32", m=2, n=94, k=1, dtype=WIDE)  # a weight of 0.06 is the sum of -1.43 and 1.49
def test_product_of_any_shape(interpreted: Matmul, name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(interpreted, name, m, n, k, dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 40, 300])
def test_a_wrong_product_is_told_from_rounding(name: str, k: int) -> None:
    """One without its last column, and one with zeros that are wrong in their lowest bit."""
    case, generator = CASES[name], Generator().manual_seed(k)
    parts, x = case.parts(70, k, generator), normal(generator, 3, k)
    right = case.unpack(parts, 70, k)
    compare(case, x @ right.T, x, parts, 70)
    wrong = [x[:, :-1] @ right[:, :-1].T]
    if case.planes:
        pairs = parts[case.planes]  # (scale, zero)
        bits = pairs.view(torch.int16 if pairs.dtype == NARROW else torch.uint8).view(-1, 2)
        others = (bits ^ bits.new_tensor([0, 1])).view(pairs.dtype).view_as(pairs)
        wrong.append(x @ case.unpack((*parts[: case.planes], others, *parts[case.planes + 1 :]), 70, k).T)
    for product in wrong:
        with pytest.raises(AssertionError, match="are wrong"):
            compare(case, product, x, parts, 70)


@pytest.mark.parametrize(("m", "dtype"), [(1, WIDE), (2, WIDE), (2, NARROW)])
def test_every_code_is_what_it_means(interpreted: Matmul, m: int, dtype: torch.dtype) -> None:
    check_codes(interpreted, m, dtype)


@pytest.mark.parametrize("name", ["int4", "fp4"])
def test_rows_of_the_input_may_be_apart(interpreted: Matmul, name: str) -> None:
    check_rows_apart(interpreted, name)


def test_other_dtypes_are_multiplied_as_float32(interpreted: Matmul) -> None:
    case, generator = CASES["int8-row"], Generator().manual_seed(0)
    parts, x = case.parts(5, 40, generator), normal(generator, 2, 40)
    product = interpreted(case.operation, x.double(), *parts, 5)
    assert torch.equal(product, interpreted(case.operation, x, *parts, 5).double())


@given(m=st.integers(1, 5000), n=st.integers(1, 300_000), k=st.integers(1, 60_000), exact=st.booleans())
def test_blocks_have_every_column_once_and_are_few(m: int, n: int, k: int, exact: bool) -> None:
    for case in (CASES["int4-g32"], CASES["int8"], CASES["fp4"]):
        blocks = case.blocks(m, n, k, exact=exact)
        assert blocks.k % (case.span or 32) == blocks.width % blocks.k == 0
        assert (blocks.splits - 1) * blocks.width < k <= blocks.splits * blocks.width
        if blocks.splits > 1:
            assert blocks.splits * blocks.programs(m, n) <= 1024
            assert blocks.width >= max(256, 2 * blocks.k)
        assert blocks.n % 64 == 0 or not case.span
        assert m == 1 or min(blocks.m, blocks.n, blocks.k) >= 16  # what tl.dot asks for


COMPILED = [("int4-g32", 16, NARROW, (128, 256), 80), ("fp4", 16, WIDE, (128, 256), 80)]
COMPILED += [(name, m, HALF, (1, 1), 80) for name in ("int8", "fp4") for m in (1, 2)]
COMPILED += [
    (name, m, NARROW, (128, 256), capability)
    for name in ("int4", "int8", "int8-row", "fp8", "fp4", "mxfp4")
    for m, capability in ((1, 80), (16, 90), (256, 86))
]


@pytest.mark.parametrize(("name", "m", "dtype", "weights", "capability"), COMPILED)
def test_every_card_has_room(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    m: int,
    dtype: torch.dtype,
    weights: tuple[int, int],
    capability: int,
) -> None:
    """The whole compiler takes it, also with the sizes that it makes constants (1), and with those that 16 divides."""
    with compiled(monkeypatch, tmp_path, capability) as made:
        case, (n, k) = CASES[name], weights
        parts = case.parts(n, k, Generator().manual_seed(0))
        on_a_card(case.operation, torch.zeros(m, k, dtype=dtype), *parts, n, *case.more)
    assert made
    for kernel in made:
        assert kernel.metadata.shared <= 64 << 10, "some cards have little more shared memory than that"


def on_a_card(operation: str, *arguments: Tensor | int) -> Tensor:
    return cast(Tensor, import_module(f"tierstore.kernels.{operation}.triton").matmul(*arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("m", "n", "k", "dtype"), ON_THE_CARD)
def test_product_on_the_card(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(on_a_card, name, m, n, k, dtype, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize(("m", "dtype"), [(1, WIDE), (2, NARROW)])
def test_every_code_on_the_card(m: int, dtype: torch.dtype) -> None:
    check_codes(on_a_card, m, dtype, "cuda")


@pytest.mark.cuda
def test_rows_apart_on_the_card() -> None:
    check_rows_apart(on_a_card, "int4", "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_it_runs_on_the_current_stream(name: str) -> None:
    """On another it would not wait for its input, which comes late here."""
    case, generator = CASES[name], Generator("cuda").manual_seed(0)
    parts, ready = case.parts(4096, 4096, generator), normal(generator, 1, 4096).bfloat16()
    x = torch.zeros_like(ready)
    compare(case, on_a_card(case.operation, ready, *parts, 4096, *case.more), ready, parts, 4096)  # compiles
    torch.cuda.synchronize()
    stream = cast(Any, torch.cuda).Stream()
    with torch.cuda.stream(stream):
        cast(Any, torch.cuda)._sleep(100_000_000)
        x.copy_(ready)
        product = on_a_card(case.operation, x, *parts, 4096, *case.more)
    stream.synchronize()
    compare(case, product, ready, parts, 4096)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("m", [1, 16, 300])
def test_on_the_card_it_is_the_same_each_time_and_takes_no_more_memory(name: str, m: int) -> None:
    case, generator = CASES[name], Generator("cuda").manual_seed(0)
    parts, x = case.parts(4096, 4096, generator), normal(generator, m, 4096).bfloat16()
    first = on_a_card(case.operation, x, *parts, 4096, *case.more)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    product = on_a_card(case.operation, x, *parts, 4096, *case.more)
    taken = torch.cuda.max_memory_allocated() - before
    splits = case.blocks(m, 4096, 4096).splits
    assert taken <= product.nbytes + (4 * splits * product.numel() if splits > 1 else 0)
    assert torch.equal(product, first)
