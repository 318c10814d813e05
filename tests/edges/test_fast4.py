"""Products compiled by llvmlite, against the same sums written for torch: equal to the last bit."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.torch_threads import threads
from tierstore.formats.cpu import FAST_ROWS, choose, int4_tile_rows
from tierstore.formats.fast4 import fast_product
from tierstore.formats.format import Format, Parts
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.linear import linear
from tierstore.formats.scratch import Scratch
from tierstore.kernels import machine_code
from tierstore.kernels.int4_matmul import reference
from tierstore.kernels.int8_matmul import reference as int8_reference
from tierstore.kernels.machine_code import can_compile

FORMS = (Int4(), Int4(32), Int4(128), Int8())
compiled = pytest.mark.skipif(not can_compile(), reason="needs llvmlite, the extra `fast`, and a processor with AVX2")


def parts_of(form: Format, n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Parts with every nibble there is, and scales of either sign."""
    made = torch.Generator().manual_seed(seed)
    return {
        part.name: torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=made)
        if part.dtype == "uint8"
        else (torch.randn(part.shape, generator=made) * 0.1).to(getattr(torch, part.dtype))
        for part in form.parts(n, k)
    }


def input_of(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, form: Format, parts: Parts, n: int) -> Tensor:
    """The product with rounded input, group by group: the same operations on float32, in the same order."""
    columns = -(-x.shape[1] // form.group) * form.group
    padded = torch.nn.functional.pad(x.float(), (0, columns - x.shape[1]))
    if isinstance(form, Int8):
        codes = reference.nibbles_of(parts["high"]).long() * 16 + reference.nibbles_of(parts["low"]) - 136
        scale, zero = int8_reference.scales_and_zeros(parts["scales"], parts["steps"]).float().unbind(2)
        whole, factors = reference.round_input(padded, form.group, 127 * 128)
        zero = zero * 17
    else:
        codes = reference.nibbles_of(parts["codes"]).long() - 8
        scale, zero = parts["scales"].float().unbind(2)
        whole, factors = reference.round_input(padded, form.group, 127)
    product = torch.zeros(len(x), len(codes))
    for number, (factor, input_) in enumerate(zip(factors.T, whole.transpose(0, 1).long(), strict=True)):
        there = slice(number * form.group, (number + 1) * form.group)
        dot = (input_ @ codes[:, there].T).float()
        sums = input_.sum(1, keepdim=True).float()
        product += factor[:, None] * (scale[number] * dot + zero[number] * sums)
    return product[:, :n].to(x.dtype)


@compiled
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 200),
    st.integers(1, 400),
    st.integers(1, 9),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 9),
)
def test_products_are_those_of_rounded_input(
    form: Format, n: int, k: int, m: int, dtype: torch.dtype, seed: int
) -> None:
    parts, x = parts_of(form, n, k, seed), input_of(m, k, seed).to(dtype)
    product = fast_product(x, form, parts, n, k, Scratch())
    assert product.dtype is dtype
    assert product.is_contiguous()
    assert torch.equal(product, expected(x, form, parts, n))


@compiled
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_largest_sums_are_exact(form: Format) -> None:
    n, k = 64, 256
    parts = parts_of(form, n, k)
    for codes in (0, 255):
        for name in parts.keys() & {"codes", "high", "low"}:
            parts[name].fill_(codes)
        for x in (torch.ones(1, k), -torch.ones(1, k), torch.ones(1, k).index_fill(1, torch.arange(0, k, 2), -1)):
            assert torch.equal(fast_product(x, form, parts, n, k, Scratch()), expected(x, form, parts, n))


@compiled
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_products_are_near_those_of_the_input(form: Format) -> None:
    n, k, m = 192, 1024, 4
    parts = form.pack(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
    x = input_of(m, k)
    exact = x @ form.unpack(parts, n, k).T
    product = fast_product(x, form, parts, n, k, Scratch())
    assert (product - exact).norm() / exact.norm() < (0.0001 if isinstance(form, Int8) else 0.01)


@compiled
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_row_depends_on_nothing_else(form: Format) -> None:
    n, k = 1024, 640
    parts, x = parts_of(form, n, k), input_of(7, k).bfloat16()
    with threads(1):
        whole = fast_product(x, form, parts, n, k, Scratch())
    for count in (1, 2, 5):
        with threads(count):
            for rows in (x[:1], x[2:5], x.flip(0)):
                product = fast_product(rows, form, parts, n, k, Scratch())
                same = torch.stack([whole[int((x == row).all(1).nonzero()[0, 0])] for row in rows])
                assert torch.equal(product, same)


@compiled
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_small_numbers_and_what_is_no_number(form: Format) -> None:
    n, k = 70, 300
    parts, scratch = form.pack(input_of(n, k)), Scratch()
    plain = input_of(1, k)
    for odd in (torch.inf, -torch.inf, torch.nan):
        x = plain.repeat(3, 1)
        x[1, 130] = odd
        product = fast_product(x, form, parts, n, k, scratch)
        assert product[1].isnan().all()
        assert torch.equal(product[::2], fast_product(plain, form, parts, n, k, scratch).expand(2, n))
    assert torch.equal(fast_product(torch.zeros(2, k), form, parts, n, k, scratch), torch.zeros(2, n))
    exact = plain @ form.unpack(parts, n, k).T
    for size in (1e-30, 1e30):
        assert torch.allclose(fast_product(plain * size, form, parts, n, k, scratch) / size, exact, atol=0.5)
    for size in (1e-36, 1e-43, 1e-45):  # factors among the denormal numbers, and below these
        x = plain * size
        assert torch.equal(fast_product(x, form, parts, n, k, scratch), expected(x, form, parts, n))


@compiled
def test_parts_of_any_strides_and_places() -> None:
    n, k, form = 130, 192, Int8()
    parts, x = parts_of(form, n, k), input_of(2, k).bfloat16()
    wide = {name: torch.stack((part, part), dim=-1)[..., 0] for name, part in parts.items()}
    shifted = {}
    for name, part in parts.items():
        memory = torch.zeros(part.nbytes + 64, dtype=torch.uint8)
        shifted[name] = memory[part.itemsize : part.itemsize + part.nbytes].view(part.dtype).view(part.shape)
        shifted[name].copy_(part)
    product = fast_product(x, form, parts, n, k, Scratch())
    assert torch.equal(fast_product(x, form, wide, n, k, Scratch()), product)
    assert torch.equal(fast_product(x, form, shifted, n, k, Scratch()), product)
    assert torch.equal(fast_product(x.T.contiguous().T, form, parts, n, k, Scratch()), product)


@compiled
def test_many_threads_multiply_at_the_same_time() -> None:
    n, k, form, scratch = 2048, 256, Int4(), Scratch()
    parts = parts_of(form, n, k)
    inputs = [input_of(m, k, m).bfloat16() for m in (1, 2, 3, 4)]
    alone = [fast_product(x, form, parts, n, k, Scratch()) for x in inputs]

    def often(x: Tensor) -> list[Tensor]:
        return [fast_product(x, form, parts, n, k, scratch) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for products, exact in zip(pool.map(often, inputs), alone, strict=True):
            assert all(torch.equal(product, exact) for product in products)


@compiled
def test_without_openmp_one_thread_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, form = 2048, 256, Int4()
    parts, x = parts_of(form, n, k), input_of(2, k)
    with threads(2):
        product = fast_product(x, form, parts, n, k, Scratch())
        monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace())
        assert machine_code._parallel.__wrapped__() == 0
        monkeypatch.setattr(machine_code, "_parallel", lambda: 0)
        assert torch.equal(fast_product(x, form, parts, n, k, Scratch()), product)


@pytest.mark.parametrize("cpu", ["haswell", "skylake-avx512", "znver4", "znver5", "sapphirerapids"])
def test_it_can_be_compiled_for_many_processors(cpu: str) -> None:
    binding = pytest.importorskip("llvmlite.binding", reason="needs llvmlite, the extra `fast`")
    from tierstore.formats.fast4_code import write

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu=cpu, opt=3)
    for digits, halves in ((1, False), (1, True), (2, False), (2, True)):
        module = binding.parse_assembly(str(write(digits, halves=halves)))
        module.verify()
        code = target.emit_assembly(module)
        assert "vpmaddubsw" in code
        # nothing that would have to be found in a library
        assert set(re.findall(r"callq\s+([^\s*]+)", code)) <= {"round_groups", "multiply"}
        assert "vfmadd" not in code  # which would round once where others round twice


def test_the_choice_needs_a_compiler_and_few_rows_of_bfloat16() -> None:
    half = torch.bfloat16
    for tile_rows, kinds in FAST_ROWS.items():
        for kind, most in kinds.items():
            assert choose(kind, most, 64, 64, half, tile_rows, True) == "fast"
            for other in (
                choose(kind, most + 1, 64, 64, half, tile_rows, True),
                choose(kind, most, 64, 64, torch.float32, tile_rows, True),
                choose(kind, most, 64, 64, half, tile_rows, False),
                choose(kind, most, 64, 64, half, 0, True),
            ):
                assert other != "fast"
    assert choose("int4-g128", 1, 64, 64, half, 32, True) == "fast"
    for name in ("bf16", "int8-row", "fp8", "fp4", "mxfp4"):
        assert choose(name, 1, 64, 64, half, 32, True) != "fast"


@compiled
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_linear_takes_it(form: Format) -> None:
    n, k = 130, 96
    parts, bias = form.pack(input_of(n, k)), input_of(1, n)[0].bfloat16()
    x = input_of(4, k).bfloat16().view(2, 2, k)
    if not FAST_ROWS.get(int4_tile_rows()):
        pytest.skip("torch has no int4 kernel here, and what is faster was not measured")
    product = linear(x, form, parts, n, k, bias, Scratch())
    assert torch.equal(product, fast_product(x.view(4, k), form, parts, n, k, Scratch()).add_(bias).view(2, 2, n))


def test_without_llvmlite_all_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)  # who imports it now has an error
    spec = spec_from_file_location("again", machine_code.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = module_from_spec(spec)
    spec.loader.exec_module(again)
    assert not again.can_compile()
