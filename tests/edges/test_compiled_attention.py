"""Attention over pages compiled by llvmlite, against float64; the same with any number of threads."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.edges.paged_problems import HALF, NARROW, RAW, WIDE, Problem, Shape, problem, some_spans
from tests.torch_threads import threads
from tierstore.kernels.kv_pages.layout import CODE_BITS, layout_of
from tierstore.kernels.machine_code import can_compile
from tierstore.kernels.paged_attention import compiled
from tierstore.kernels.paged_attention.partial import Partial

needs_compiler = pytest.mark.skipif(
    not can_compile(), reason="needs llvmlite, the extra `fast`, and a processor with AVX2"
)

SHAPES = [
    Shape(2, 4, 2, 1, 16, 16, 16, 3),
    Shape(3, 6, 1, 1, 24, 8, 8, 9),  # one head of keys
    Shape(2, 16, 2, 1, 40, 72, 12, 5),  # more queries than registers, and a rest of dimensions
    Shape(1, 2, 2, 1, 128, 128, 64, 40),  # pages are split, and merged
    Shape(1, 2, 1, 1, 256, 256, 64, 3),
    Shape(2, 2, 2, 1, 8, 8, 1, 5),  # pages of one token
    Shape(2, 2, 1, 1, 16, 16, 16, 0),
    Shape(0, 2, 1, 1, 16, 16, 16, 2),
]


def whole(module: str, function: str, *arguments: Any, **options: Any) -> Partial:
    return compiled.combine([getattr(compiled, function)(*arguments, **options)])


def check(asked: Problem, tolerance: float = 1e-5) -> None:
    """Keys and values are what they are, and sums are float32: the dtype of pages costs nothing."""
    found = whole("", asked.function, *asked.arguments, **asked.options)
    for part, exact in zip(found, asked.exact, strict=True):
        assert part.dtype == WIDE
        torch.testing.assert_close(part.double(), exact, atol=tolerance, rtol=tolerance)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [NARROW, HALF, WIDE])
def test_decode(shape: Shape, dtype: torch.dtype) -> None:
    check(problem(RAW, shape, dtype, some_spans(shape), softcap=2.0 if shape.rows == 2 else None))


PACKED = [
    Shape(2, 4, 2, 1, 16, 16, 16, 3),
    Shape(3, 14, 2, 1, 40, 8, 8, 5),  # more queries than registers
    Shape(1, 2, 2, 1, 72, 40, 64, 12),
    Shape(1, 8, 1, 1, 128, 128, 64, 40),  # split, and merged
    Shape(2, 2, 1, 1, 16, 16, 16, 0),
]


@needs_compiler
@pytest.mark.parametrize("form", CODE_BITS)
@pytest.mark.parametrize("shape", PACKED)
def test_decode_packed(form: str, shape: Shape) -> None:
    """In float32, as whose numbers the exact ones are rounded too: scores may be larger, and their errors with them."""
    check(problem(form, shape, WIDE, some_spans(shape), softcap=2.0 if shape.rows == 2 else None), 2e-5)


@needs_compiler
@settings(deadline=None, max_examples=15)
@given(
    form=st.sampled_from(list(CODE_BITS)),
    rows=st.integers(1, 3),
    tokens=st.sampled_from([8, 16, 64]),
    pages=st.integers(1, 5),
    spans=st.lists(st.tuples(st.integers(-3, 200), st.integers(-3, 250)), min_size=3, max_size=3),
)
def test_decode_packed_of_any_span(form: str, rows: int, tokens: int, pages: int, spans: list[tuple[int, int]]) -> None:
    """With and without the first token of a page, which is kept as it is."""
    shape = Shape(rows, 6, 2, 1, 24, 16, tokens, pages)
    check(problem(form, shape, WIDE, torch.tensor(spans[:rows], dtype=torch.int32)), 2e-5)


@needs_compiler
@pytest.mark.parametrize("form", CODE_BITS)
def test_a_scale_that_is_no_number_is_its_own_tokens_only(form: str) -> None:
    """Of a page outside of the span nothing is looked at, nor of values outside of it in the same page."""
    shape = Shape(1, 2, 1, 1, 16, 16, 16, 3)
    asked = problem(form, shape, WIDE, torch.tensor([[16, 28]], dtype=torch.int32))
    layout = layout_of(form, 1, 16, 16, 16)
    buffer, cells = asked.arguments[1], asked.arguments[2][0].tolist()
    for cell in (cells[0], cells[2]):
        buffer[cell : cell + layout.nbytes] = 255
    behind = cells[1] + layout.value_scales + 2 * 12
    buffer[behind : behind + 8].view(NARROW).fill_(torch.nan)
    check(asked, 2e-5)
    buffer[behind - 2 : behind].view(NARROW).fill_(torch.nan)
    assert whole("", asked.function, *asked.arguments, **asked.options).out.isnan().all()


@needs_compiler
@settings(deadline=None, max_examples=20)
@given(
    shape=st.builds(
        lambda rows, heads, group, key, value, tokens, pages: Shape(
            rows, heads * group, heads, 1, 8 * key, 8 * value, tokens, pages
        ),
        *(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 7]), st.sampled_from([1, 5, 8])),
        *(st.sampled_from([2, 4, 9]), st.integers(1, 40), st.integers(1, 6)),
    ),
    dtype=st.sampled_from([NARROW, HALF, WIDE]),
    spans=st.lists(st.tuples(st.integers(-3, 200), st.integers(-3, 250)), min_size=3, max_size=3),
)
def test_decode_of_any_shape(shape: Shape, dtype: torch.dtype, spans: list[tuple[int, int]]) -> None:
    """A span may begin before the first token, end behind the last, or be none."""
    check(problem(RAW, shape, dtype, torch.tensor(spans[: shape.rows], dtype=torch.int32)))


@needs_compiler
@pytest.mark.parametrize(("form", "heads", "pages"), [(RAW, 1, 520), (RAW, 8, 65), ("int8", 8, 260)])
def test_threads_change_no_bit(form: str, heads: int, pages: int) -> None:
    shape = Shape(1, heads * 2, heads, 1, 64, 64, 64, pages)
    asked = problem(form, shape, WIDE, some_spans(shape))
    assert pages * 64 * heads * 128 * (4 if form == RAW else 1) > 3 * compiled.THREAD_NBYTES
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(whole("", asked.function, *asked.arguments, **asked.options))
    assert all(torch.equal(part, first) for each in found[1:] for part, first in zip(each, found[0], strict=True))


@needs_compiler
def test_threads_of_the_caller_do_not_meet() -> None:
    shapes = [Shape(2, 4, 2, 1, 64, 64, 16, pages) for pages in (3, 50, 200, 7)]
    asked = [problem(RAW, shape, NARROW, some_spans(shape)) for shape in shapes]
    alone = [whole("", each.function, *each.arguments, **each.options) for each in asked]

    def often(each: Problem) -> list[Partial]:
        return [whole("", each.function, *each.arguments, **each.options) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for many, one in zip(pool.map(often, asked), alone, strict=True):
            assert all(torch.equal(found.out, one.out) and torch.equal(found.lse, one.lse) for found in many)


@needs_compiler
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_parts_are_the_whole(cut: int) -> None:
    """Pages in two calls, as they come."""
    shape = Shape(2, 4, 2, 1, 32, 32, 16, 7)
    asked = problem(RAW, shape, WIDE, torch.tensor([[0, 112], [0, 112]], dtype=torch.int32))
    q, buffer, keys, values, _ = asked.arguments
    parts = []
    for pages in (slice(cut), slice(cut, None)):
        tables = [each[:, pages].contiguous() for each in (keys, values)]
        spans = torch.tensor([[0, tables[0].shape[1] * 16]] * 2, dtype=torch.int32)
        parts.append(compiled.decode_raw(q, buffer, tables[0], tables[1], spans, **asked.options))
    for found, exact in zip(compiled.combine(parts), asked.exact, strict=True):
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_a_page_outside_of_the_span_is_not_read() -> None:
    asked = problem(RAW, Shape(1, 2, 1, 1, 16, 16, 16, 4), WIDE, torch.tensor([[16, 40]], dtype=torch.int32))
    for table in asked.arguments[2:4]:
        table[0, 0] = table[0, 3] = 1 << 50
    check(asked)


@needs_compiler
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_so(number: float) -> None:
    """In the query that meets it; others do not change."""
    asked = problem(RAW, Shape(2, 1, 1, 1, 16, 16, 64, 9), WIDE, torch.tensor([[0, 64]] * 2, dtype=torch.int32))
    q, buffer, keys, *_ = asked.arguments
    q[0, 0, 0, 0] = 1
    buffer[int(keys[0, 0]) :][:4].view(WIDE).fill_(number)
    found = whole("", asked.function, *asked.arguments, **asked.options)
    assert found.out[0].isnan().all()
    torch.testing.assert_close(found.out[1].double(), asked.exact.out[1], atol=1e-5, rtol=1e-5)


@needs_compiler
def test_scores_may_be_far_apart() -> None:
    """The largest takes all, and nothing overflows."""
    asked = problem(RAW, Shape(1, 1, 1, 1, 8, 8, 4, 3), WIDE, torch.tensor([[0, 12]], dtype=torch.int32))
    q, buffer, keys, values, _ = asked.arguments
    q.fill_(1e4)
    rows = [buffer[int(at) :][: 4 * 8 * 4].view(WIDE).view(4, 8) for at in keys[0]]
    for number, row in enumerate(rows):
        row.fill_(-1e4)
        row[2] = 1e3 * number
    found = whole("", asked.function, *asked.arguments, **asked.options)
    best = buffer[int(values[0, 2]) :][: 4 * 8 * 4].view(WIDE).view(4, 8)[2]
    assert torch.equal(found.out[0, 0, 0], best)
    assert found.lse.item() == pytest.approx(8 * 0.4 * 1e4 * 2e3)


@pytest.mark.parametrize(
    ("change", "need"),
    [
        ({"q": torch.zeros(1, 3, 1, 16)}, "multiple"),
        ({"q": torch.zeros(1, 2, 2, 16)}, "one is needed"),
        ({"q": torch.zeros(1, 2, 1, 20)}, "multiples of 8"),
        ({"value_dim": 12}, "multiples of 8"),
        ({"key_offsets": torch.zeros(1, 2)}, "int64"),
        ({"value_offsets": torch.zeros(1, 3, dtype=torch.int64)}, r"int64 \[1, 2\]"),
        ({"spans": torch.zeros(1, 2, dtype=torch.int64)}, "int32"),
        ({"buffer": torch.zeros(64)}, "bytes in one dimension"),
        ({"buffer": torch.zeros(64, dtype=torch.uint8, device="meta")}, "host memory"),
        ({"dtype": torch.float64}, "bfloat16"),
    ],
)
def test_what_cannot_be_read_is_refused(change: dict[str, Any], need: str) -> None:
    asked: dict[str, Any] = {
        "q": torch.zeros(1, 2, 1, 16),
        "buffer": torch.zeros(4096, dtype=torch.uint8),
        "key_offsets": torch.zeros(1, 2, dtype=torch.int64),
        "value_offsets": torch.zeros(1, 2, dtype=torch.int64),
        "spans": torch.zeros(1, 2, dtype=torch.int32),
        **{"dtype": WIDE, "heads": 2, "value_dim": 16, "piece_tokens": 16, "scale": 1.0},
    }
    with pytest.raises(ValueError, match=need):
        compiled.decode_raw(**(asked | change))


@pytest.mark.parametrize("cpu", ["haswell", "skylake-avx512", "znver4", "sapphirerapids"])
def test_it_can_be_compiled_for_many_processors(cpu: str) -> None:
    binding = pytest.importorskip("llvmlite.binding", reason="needs llvmlite, the extra `fast`")
    from tierstore.kernels.paged_attention.vector_packed import PackedAttention
    from tierstore.kernels.paged_attention.vector_raw import RawAttention

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu=cpu, opt=3)
    raw = [
        RawAttention(element, 2, 3, 64, 40, page_tokens=64, capped=element == "float16")
        for element in compiled.DTYPES.values()
    ]
    packed = [PackedAttention(form, 2, 3, 64, 40, page_tokens=64) for form in CODE_BITS]
    for written in (*raw, *packed):
        module = binding.parse_assembly(str(written.write()))
        module.verify()
        code = target.emit_assembly(module)
        assert "vfmadd" in code
        # nothing that would have to be found in a library
        assert set(re.findall(r"callq\s+([^\s*]+)", code)) <= {"attend"}
