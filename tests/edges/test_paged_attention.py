"""Attention over pages, and their raw tokens, by Triton: interpreted, compiled for several cards, and run on one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from tests.edges.compiler import compiled
from tests.edges.interpreter import ROOT, Interpreter
from tests.edges.paged_problems import (
    FORMATS,
    HALF,
    NARROW,
    RAW,
    WIDE,
    Call,
    Shape,
    problem,
    some_spans,
    spread,
    up,
)
from tierstore.kernels.paged_attention import reference

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

SHAPES = [
    Shape(2, 4, 2, 1, 16, 16, 16, 3),
    Shape(1, 2, 2, 1, 20, 8, 64, 2),  # odd heads, one query of each
    Shape(3, 6, 1, 1, 5, 7, 8, 9),  # one head of keys
    Shape(1, 2, 2, 1, 16, 16, 64, 9),  # pages are split, and merged
    Shape(1, 4, 1, 20, 16, 24, 64, 8),  # more queries than a block has
    Shape(1, 2, 1, 1, 300, 300, 64, 2),  # a page is more than a tile
    Shape(2, 2, 1, 1, 16, 16, 12, 2),  # pages that are no power of two
    Shape(2, 2, 1, 1, 16, 16, 16, 0),
    Shape(0, 2, 1, 1, 16, 16, 16, 2),
    Shape(1, 2, 1, 0, 16, 16, 16, 2),
]


@pytest.fixture(scope="module")
def interpreted(interpreter: Interpreter) -> Call:
    return interpreter.call


EVERY = [(form, shape) for form in (RAW, "int4") for shape in SHAPES] + [(RAW, Shape(2, 2, 2, 1, 16, 16, 1, 5))]
SOME = [(form, SHAPES[i]) for form in ("int8", "fp8", "fp4", "int2") for i in (1, 2, 5)]


@pytest.mark.parametrize(("form", "shape"), EVERY + SOME)
def test_decode(interpreted: Call, form: str, shape: Shape) -> None:
    dtype = (NARROW, HALF, WIDE)[(shape.pages + shape.key_dim) % 3]
    problem(form, shape, dtype, some_spans(shape), softcap=2.0 if shape.rows == 2 else None).check(interpreted)


@settings(deadline=None, max_examples=12)
@given(
    form=st.sampled_from(FORMATS),
    shape=st.builds(
        lambda heads, group, *sizes: Shape(1, heads * group, heads, *sizes),
        *(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 17])),
        *(st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 12, 16, 20, 36]), st.integers(1, 5)),
    ),
    dtype=st.sampled_from([NARROW, HALF, WIDE]),
    span=st.tuples(st.integers(-3, 100), st.integers(-3, 120)),
)
def test_decode_of_any_shape(
    interpreted: Call, form: str, shape: Shape, dtype: torch.dtype, span: tuple[int, int]
) -> None:
    """A span may begin before the first token, and end behind the last."""
    problem(form, shape, dtype, torch.tensor([span], dtype=torch.int32)).check(interpreted)


def test_a_page_outside_of_the_span_is_not_read(interpreted: Call) -> None:
    """Its offset may be that of no page."""
    shape = Shape(1, 2, 1, 1, 16, 16, 16, 4)
    asked = problem("int8", shape, WIDE, torch.tensor([[16, 40]], dtype=torch.int32))
    asked.arguments[2][0, 0] = asked.arguments[2][0, 3] = 1 << 50
    asked.check(interpreted)


def test_what_is_not_a_number_stays_so(interpreted: Call) -> None:
    """In the query that meets it, split or not; others do not change."""
    for pages in (1, 9):
        asked = problem(RAW, Shape(2, 1, 1, 1, 16, 16, 64, pages), WIDE, torch.tensor([[0, 64]] * 2, dtype=torch.int32))
        _, buffer, keys, *_ = asked.arguments
        buffer[int(keys[0, 0]) :][:4].view(WIDE).fill_(torch.nan)
        out, lse = interpreted("paged_attention.triton", asked.function, *asked.arguments, **asked.options)
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        torch.testing.assert_close(out[1].double(), asked.exact.out[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "need"),
    [
        ({"q": torch.zeros(1, 3, 1, 16)}, "multiple of 2 heads"),
        ({"q": torch.zeros(1, 2, 1, 16).double()}, "float64"),
        ({"offsets": torch.zeros(1, 2)}, "int64"),
        ({"offsets": torch.zeros(2, 2, dtype=torch.int64)}, r"int64 \[1, pages\]"),
        ({"spans": torch.zeros(1, 2, dtype=torch.int64)}, "int32"),
        ({"buffer": torch.zeros(64)}, "bytes in one dimension"),
        ({"kv_format": "int3"}, "there are .*int8"),
    ],
)
def test_what_cannot_be_read_is_refused(change: dict[str, Any], need: str) -> None:
    whole = {
        "q": torch.zeros(1, 2, 1, 16),
        "buffer": torch.zeros(4096, dtype=torch.uint8),
        "offsets": torch.zeros(1, 2, dtype=torch.int64),
        "spans": torch.zeros(1, 2, dtype=torch.int32),
        "kv_format": "int8",
    }
    asked = whole | change
    sizes: dict[str, Any] = {"heads": 2, "value_dim": 16, "page_tokens": 16, "scale": 1.0}
    with pytest.raises(ValueError, match=need):
        on_a_card("paged_attention.triton", "decode", **asked, **sizes)


# ---- raw tokens


@dataclass(frozen=True)
class Raw:
    """Keys and values of some rows, and a buffer with pieces of ``piece_tokens`` tokens: where each of them goes."""

    states: tuple[Tensor, Tensor]
    buffer: Tensor
    offsets: Tensor
    pieces: Tensor
    at: Tensor

    @property
    def where(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offsets, self.pieces, self.at


def some_raw(rows: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> Raw:
    """7 tokens a row, in any order among pieces of 4 tokens; of the last piece only, no keys are there, nor values."""
    generator = Generator(device).manual_seed(rows + heads)
    count, tokens = 2 * rows + 1, 4
    room = up(tokens * heads * max(dims) * dtype.itemsize)
    noise = torch.randint(0, 255, (2 * count, room), generator=generator, device=device)
    buffer, places = spread(noise.to(torch.uint8), generator, room)
    offsets = places.view(2, count).clone()
    offsets[:, -1] = -1
    order = torch.randperm(count * tokens, generator=generator, device=device)[: rows * 7].view(rows, 7)
    states = [
        torch.randn(rows, heads, 7, dim, generator=generator, device=device).to(dtype).transpose(1, 2) for dim in dims
    ]
    return Raw((states[0], states[1]), buffer, offsets, order // tokens, order % tokens)


def check_tokens(call: Call, rows: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Written and read back, into tensors that lie the other way round."""
    made = some_raw(rows, heads, dims, dtype, device)
    wanted = made.buffer.clone()
    reference.scatter(*made.states, wanted, *made.where)
    result = call("paged_attention.raw", "scatter", *made.states, made.buffer, *made.where)
    assert torch.equal(made.buffer if result is None else result[2], wanted)
    into = [torch.zeros_like(each) for each in made.states]
    expected = [each.clone() for each in into]
    reference.gather(wanted, *made.where, *expected)
    result = call("paged_attention.raw", "gather", wanted, *made.where, *into)
    read = into if result is None else result[4:]
    there = made.offsets[0][made.pieces] >= 0
    for found, wants, states in zip(read, expected, made.states, strict=True):
        assert torch.equal(found, wants)
        assert torch.equal(found[there], states[there])
        assert not found[~there].any()


RAWS = [(1, 1, (1, 1), WIDE), (2, 2, (16, 8), NARROW), (3, 3, (5, 7), HALF), (2, 1, (1500, 1030), NARROW)]


@pytest.mark.parametrize(("rows", "heads", "dims", "dtype"), RAWS)
def test_raw_tokens(interpreted: Call, rows: int, heads: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    check_tokens(interpreted, rows, heads, dims, dtype, "cpu")


FAR = """
import sys, torch
from tierstore.kernels.paged_attention.raw import scatter
heads, apart, dim = 3, 1 << 30, 16
memory = torch.from_file(sys.argv[1], shared=True, size=heads * apart, dtype=torch.int16)
keys = memory.as_strided((1, 1, heads, dim), (1, 1, apart, 1))
keys.copy_(torch.arange(heads * dim).view(1, 1, heads, dim))
buffer, first = torch.zeros(2, heads * dim, dtype=torch.int16), torch.zeros(1, 1, dtype=torch.int64)
offsets = torch.tensor([[0], [heads * dim * 2]])
scatter(keys, torch.ones(1, 1, heads, dim, dtype=torch.int16), buffer.view(-1).view(torch.uint8), offsets, first, first)
print(torch.equal(buffer[0], torch.arange(heads * dim, dtype=torch.int16)), bool((buffer[1] == 1).all()))
"""


def test_heads_may_be_further_apart_than_32_bits_say(tmp_path: Path) -> None:
    """As they are where very many tokens of many heads are gathered. The file has holes, and takes no room."""
    with (tmp_path / "far").open("wb") as file:
        file.truncate(3 * 2 << 30)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FAR, str(tmp_path / "far")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize(
    ("change", "need"),
    [
        ({"values": torch.zeros(1, 2, 1, 8).half()}, "alike"),
        ({"values": torch.zeros(1, 2, 2, 8)}, "alike"),
        ({"buffer": torch.zeros(64)}, "bytes in one dimension"),
        ({"offsets": torch.zeros(1, 2, dtype=torch.int64)}, r"int64 \[2, pieces\]"),
        ({"pieces": torch.zeros(1, 2, dtype=torch.int32)}, r"int64 \[1, 2\]"),
        ({"at": torch.zeros(2, 2, dtype=torch.int64)}, r"int64 \[1, 2\]"),
    ],
)
def test_raw_tokens_that_have_no_place_are_refused(change: dict[str, Any], need: str) -> None:
    whole = {
        "keys": torch.zeros(1, 2, 1, 16),
        "values": torch.zeros(1, 2, 1, 8),
        "buffer": torch.zeros(4096, dtype=torch.uint8),
        "offsets": torch.zeros(2, 3, dtype=torch.int64),
        "pieces": torch.zeros(1, 2, dtype=torch.int64),
        "at": torch.zeros(1, 2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=need):
        on_a_card("paged_attention.raw", "scatter", **(whole | change))


# ---- cards


def on_a_card(module: str, function: str, *arguments: Any, **options: Any) -> Any:
    return getattr(import_module(f"tierstore.kernels.{module}"), function)(*arguments, **options)


COMPILED = [
    (RAW, 4, 1, 128, NARROW, 90),
    ("int8", 4, 8, 256, HALF, 90),
    ("fp8", 1, 1, 128, NARROW, 80),
    ("int4", 4, 1, 128, NARROW, 80),
    ("int2", 4, 1, 80, WIDE, 86),
]


@pytest.mark.parametrize(("form", "group", "queries", "dim", "dtype", "capability"), COMPILED)
def test_every_card_has_room(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    form: str,
    group: int,
    queries: int,
    dim: int,
    dtype: torch.dtype,
    capability: int,
) -> None:
    shape = Shape(1, group, 1, queries, dim, dim, 64, 9)
    asked = problem(form, shape, dtype, some_spans(shape))
    with compiled(monkeypatch, tmp_path, capability) as made:
        on_a_card("paged_attention.triton", asked.function, *asked.arguments, **asked.options)
    assert [kernel.metadata.name for kernel in made] == ["attend", "merge_splits"]
    for kernel in made:
        assert kernel.metadata.shared <= 96 << 10, "the least that a card has is 99 KiB"


def test_raw_tokens_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = some_raw(2, 8, (128, 64), NARROW)
    with compiled(monkeypatch, tmp_path, 80) as kernels:
        on_a_card("paged_attention.raw", "scatter", *made.states, made.buffer, *made.where)
        on_a_card("paged_attention.raw", "gather", made.buffer, *made.where, *made.states)
    assert len(kernels) == 2


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [NARROW, WIDE])
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        Shape(3, 32, 8, 1, 128, 128, 64, 20),
        Shape(2, 8, 8, 1, 128, 128, 64, 200),
        Shape(2, 16, 2, 9, 256, 256, 64, 40),
        Shape(2, 6, 3, 2, 80, 96, 64, 40),
    ],
)
def test_decode_on_the_card(form: str, shape: Shape, dtype: torch.dtype) -> None:
    problem(form, shape, dtype, some_spans(shape, "cuda"), softcap=2.0, device="cuda").check(on_a_card)


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "heads", "dims", "dtype"), [*RAWS, (3, 8, (128, 128), NARROW)])
def test_raw_tokens_on_the_card(rows: int, heads: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    check_tokens(on_a_card, rows, heads, dims, dtype, "cuda")
