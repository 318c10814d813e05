"""Products with packed matrices, against what each format says that its parts mean."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tierstore.errors import DeviceError
from tierstore.formats import cpu, tiles
from tierstore.formats import linear as linear_file
from tierstore.formats.bf16 import Bf16
from tierstore.formats.cpu import MOST_ROWS, arithmetic, can_be_packed, choose, int4_tile_rows, packed_product
from tierstore.formats.format import Format, Parts
from tierstore.formats.fp4 import Fp4
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.int8_row import Int8Row
from tierstore.formats.linear import MATMULS, by_tiles, dequantise, linear, unpack_rows
from tierstore.formats.mxfp4 import MxFp4
from tierstore.formats.named import FORMATS
from tierstore.formats.scratch import Scratch
from tierstore.kernels.machine_code import can_compile

ROOT = Path(__file__).parents[2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-20, torch.float64: 2.0**-46}
"""Of a sum, relative to the sum of magnitudes: two roundings of the result, and those on the way."""
SHAPES = [(1, 1), (1, 64), (64, 64), (65, 3), (3, 65), (130, 100), (63, 32), (200, 256), (129, 320)]


@pytest.fixture(params=list(FORMATS))
def form(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def matrix(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def check_product(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, input_rounding: float = 0.0
) -> None:
    """``y`` is ``F.linear(x, weight, bias)`` as near as its dtype lets it be, and as input lets it be that was rounded
    to within ``input_rounding`` of a row's greatest magnitude."""
    assert y.dtype is x.dtype
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    assert y.is_contiguous()
    exact, most = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    rounded = input_rounding * x.double().abs().amax(-1, keepdim=True) if input_rounding else torch.zeros(1)
    slack = rounded * weight.double().abs().sum(1) + torch.finfo(x.dtype).tiny
    assert ((y.double() - exact).abs() <= ROUNDING[x.dtype] * most + slack).all()


def input_rounding_of(form: Format, m: int, dtype: torch.dtype) -> float:
    """What ``linear`` may round ``m`` rows of input by, for ``check_product``."""
    way = choose(form.name, m, 64, 64, dtype, int4_tile_rows(), can_compile())
    return 0.5 / 127 if way == "fast" and isinstance(form, Int4) else 0.0


# --- products ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 7, 70])
def test_products(form: Format, dtype: torch.dtype, m: int) -> None:
    scratch = Scratch()
    for n, k in SHAPES:
        parts = form.pack(matrix(n, k))
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        weight, rounding = form.unpack(parts, n, k), input_rounding_of(form, m, dtype)
        check_product(linear(x, form, parts, n, k, None, scratch), x, weight, None, rounding)
        check_product(linear(x, form, parts, n, k, bias, scratch), x, weight, bias, rounding)


def test_both_ways_of_a_product(form: Format) -> None:
    scratch = Scratch()
    for n, k in SHAPES:
        parts = form.pack(matrix(n, k))
        weight = form.unpack(parts, n, k)
        for m in (1, 5, 50):
            x = torch.randn(m, k).bfloat16()
            for dtype in (torch.bfloat16, torch.float32):
                check_product(by_tiles(x, form, parts, n, k, dtype, scratch), x, weight)
            if can_be_packed(form.name, k, x.dtype, int4_tile_rows()):
                check_product(packed_product(x, form, parts, n, k, scratch), x, weight)


def test_chunks_of_every_size_give_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, form, scratch = 300, 70, Int8(), Scratch()
    parts, x = form.pack(matrix(n, k)), torch.randn(3, k).bfloat16()
    products = []
    for size in (1, 3 * 128 * 64, 1 << 23):
        monkeypatch.setattr(cpu, "CHUNK", size)
        products.append(linear(x, form, parts, n, k, None, scratch))
        assert torch.equal(products[-1], products[0])
    check_product(products[0], x, form.unpack(parts, n, k))


def test_products_of_inputs_of_any_shape(form: Format) -> None:
    n, k, scratch = 40, 96, Scratch()
    parts = form.pack(matrix(n, k))
    weight = form.unpack(parts, n, k)
    whole = torch.randn(4, 6, 2 * k).bfloat16()
    for x in (
        whole[0, 0, :k],
        whole[:, :, :k],
        whole[:, -1:, ::2],
        whole[..., :k].transpose(0, 1),
        whole[0, 0, :k].expand(2, 3, k),
        whole[:0, 0, :k],
        whole[:, :0, :k],
    ):
        rounding = input_rounding_of(form, x.numel() // k, x.dtype)
        check_product(linear(x, form, parts, n, k, None, scratch), x, weight, None, rounding)


@pytest.mark.parametrize(("n", "k"), [(0, 8), (5, 0), (0, 0)])
def test_products_with_empty_matrices(form: Format, n: int, k: int) -> None:
    parts = form.pack(torch.empty(n, k))
    x, bias = torch.randn(3, 2, k).bfloat16(), torch.randn(n).bfloat16()
    assert torch.equal(linear(x, form, parts, n, k, bias, Scratch()), bias.expand(3, 2, n))
    assert linear(x[:0], form, parts, n, k, bias, Scratch()).shape == (0, 2, n)


def test_tiles_of_every_size_give_the_same_product(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, scratch = 200, 64, Scratch()
    parts = form.pack(matrix(n, k))
    x = torch.randn(80, k)
    for size in (1, 64 * k, 128 * k, 1 << 20):
        monkeypatch.setattr(tiles, "TILE", size)
        firsts = [first for first, _ in tiles.tiles(form, parts, n, k, x.dtype, scratch)]
        assert firsts == list(range(0, n, max(1, size // k // 64) * 64))
        check_product(linear(x, form, parts, n, k, None, scratch), x, form.unpack(parts, n, k))


def test_padding_never_matters() -> None:
    n, k, scratch = 65, 70, Scratch()
    for form in (Int4(), Int4(128), Int8(), Fp4(), MxFp4()):
        parts = form.pack(matrix(n, k))
        soiled = {name: part.clone() for name, part in parts.items()}
        if isinstance(form, Int4 | Int8):
            for name in soiled.keys() & {"codes", "high", "low"}:
                columns = soiled[name].view(2, -1, 32)
                columns[:, k:] = 0x5A  # columns beyond k
                columns[1, :, 1:] = 0xA5  # rows beyond n: 65 is alone in its block ...
                columns[1, :, 0] |= 0x70  # ... and so is its lower half
            if isinstance(form, Int8):
                soiled["scales"].view(2, -1, 64, 2)[1, :, 1:] = 77
                soiled["steps"][n:] = torch.nan
            else:
                soiled["scales"][:, n:] = torch.nan
        else:
            soiled["codes"][:, -(-k // 2) :] = 0x5A
        assert any(not torch.equal(parts[name], part) for name, part in soiled.items())
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(
                dequantise(form, soiled, (n, k), dtype, None), dequantise(form, parts, (n, k), dtype, None)
            )
            for m in (1, 60):
                x = torch.randn(m, k).to(dtype)
                assert torch.equal(
                    linear(x, form, soiled, n, k, None, scratch), linear(x, form, parts, n, k, None, scratch)
                )


def test_the_same_product_is_the_same_every_time(form: Format) -> None:
    n, k = 130, 256
    parts = form.pack(matrix(n, k))
    for m in (1, 3, 90):
        x = torch.randn(m, k).bfloat16()
        first = linear(x, form, parts, n, k, None, Scratch())
        assert torch.equal(linear(x, form, parts, n, k, None, Scratch()), first)
        with torch.inference_mode():
            assert torch.equal(linear(x, form, parts, n, k, None, Scratch()), first)


def test_what_does_not_fit_is_refused(form: Format) -> None:
    parts = form.pack(matrix(6, 40))
    for x in (torch.ones(3, 41), torch.ones(()), torch.ones(40, 3), torch.ones(3, 40, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"\(6, 40\) multiplies floating tensors with 40 values"):
            linear(x, form, parts, 6, 40, None, Scratch())


def test_on_meta_only_shapes_are_worked_out(form: Format) -> None:
    parts = {s.name: torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta") for s in form.parts(6, 40)}
    assert linear(torch.empty(2, 3, 40, device="meta"), form, parts, 6, 40, None, Scratch()).shape == (2, 3, 6)
    assert dequantise(form, parts, (6, 40), torch.bfloat16, None).shape == (6, 40)


class Elsewhere(Tensor):
    """Seems to be on a device that this machine may not have."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stubs are narrower than torch
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} is carried out")


def elsewhere(device: str, *shape: int) -> Tensor:
    return Tensor._make_wrapper_subclass(Elsewhere, shape, dtype=torch.bfloat16, device=torch.device(device))


def test_other_devices_are_named() -> None:
    x = elsewhere("xpu", 2, 40)
    with pytest.raises(DeviceError, match=r"int4 are multiplied on cpu and cuda devices.*not on xpu.*unpacked"):
        linear_file._on_device(x, Int4(), Int4().pack(matrix(6, 40)), 6, 40, Scratch())


# --- which way ---


def test_the_choice_is_a_table() -> None:
    half = torch.bfloat16
    for name in FORMATS:
        assert choose(name, 1, 64, 64, torch.float32, 64, False) == "tiles"
        assert choose(name, 1, 64, 64, torch.float16, 64, False) == "tiles"
        assert choose(name, 10_000, 64, 64, half, 64, False) == ("packed" if name == "bf16" else "tiles")
        for tile_rows in (64, 32, 0):
            way = choose(name, 1, 64, 64, half, tile_rows, False)
            assert (way == "packed") == can_be_packed(name, 64, half, tile_rows)
    for rows, kinds in MOST_ROWS.items():
        for kind, most in kinds.items():
            assert choose(kind, most, 64, 64, half, rows, False) == "packed"
            assert choose(kind, most + 1, 64, 64, half, rows, False) == "tiles"
    assert choose("int4-g128", 1, 64, 64, half, 64, False) == "packed"
    assert choose("int4", 1, 64, 64, half, 0, False) == "tiles"
    assert choose("fp4", 1, 64, 64, half, 64, False) == "tiles"


def test_torch_gets_no_row_length_that_it_would_read_beyond() -> None:
    assert choose("int8-row", 1, 64, 72, torch.bfloat16, 64, False) == "tiles"
    form = Int8Row()
    for k in (1, 8, 15, 17, 24, 72):
        parts = form.pack(matrix(5, k))
        x = torch.randn(1, k).bfloat16()
        check_product(linear(x, form, parts, 5, k, None, Scratch()), x, form.unpack(parts, 5, k))


def test_arithmetic_is_never_coarser_than_the_input() -> None:
    for dtype in DTYPES:
        for rows in (1, 2, 100):
            assert torch.finfo(arithmetic(dtype, rows)).eps <= torch.finfo(dtype).eps


ON_OTHER_PROCESSORS = """
import torch
from tierstore.formats import cpu
from tierstore.formats.linear import dequantise, linear
from tierstore.formats.named import FORMATS
from tierstore.formats.scratch import Scratch
torch.set_num_threads(1)
torch.manual_seed(0)
worst = 0.0
for form in FORMATS.values():
    for n, k in ((65, 70), (128, 256)):
        parts = form.pack(torch.randn(n, k))
        weight = form.unpack(parts, n, k)
        assert torch.equal(dequantise(form, parts, (n, k), torch.bfloat16, None), weight.bfloat16()), form
        for m, cpu.CHUNK in ((1, 1 << 23), (3, 1 << 23), (2, 1), (64, 1)):
            x = torch.randn(m, k).bfloat16()
            y = linear(x, form, parts, n, k, None, Scratch()).double()
            off = (y - x.double() @ weight.double().T).abs() / (x.double().abs() @ weight.double().abs().T)
            worst = max(worst, off.max().item())
print(cpu.int4_tile_rows(), torch.backends.cpu.get_cpu_capability(), worst)
"""


@pytest.mark.parametrize(("capability", "tile_rows"), [("avx2", 32), ("default", 0)])
def test_products_on_lesser_processors(capability: str, tile_rows: int) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", ON_OTHER_PROCESSORS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows, name, worst = done.stdout.split()
    assert float(worst) < ROUNDING[torch.bfloat16]
    if name.lower() == capability:  # a processor that has less stays what it is
        assert int(rows) == tile_rows


def test_threads_multiply_at_the_same_time(form: Format) -> None:
    scratch = Scratch()
    weights = [form.pack(matrix(130, 96, seed)) for seed in range(4)]
    inputs = [torch.randn(m, 96).bfloat16() for m in (1, 2, 30, 60)]
    alone = [linear(x, form, parts, 130, 96, None, Scratch()) for x, parts in zip(inputs, weights, strict=True)]

    def often(x: Tensor, parts: Parts) -> list[Tensor]:
        return [linear(x, form, parts, 130, 96, None, scratch) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for products, exact in zip(pool.map(often, inputs, weights), alone, strict=True):
            assert all(torch.equal(product, exact) for product in products)


# --- GPUs ---


def test_kernels_get_their_parts_in_order(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(form, Bf16):
        assert type(form) not in MATMULS
        return
    operation, names = MATMULS[type(form)]
    reference = import_module(f"tierstore.kernels.{operation}.reference")
    assert list(names) == [part.name for part in form.parts(64, 64)]
    assert ["x", *names, "n"] == [p for p in inspect.signature(reference.matmul).parameters if p != "group"]
    asked: list[str] = []

    def kernel(operation: str, device: torch.device) -> Callable[..., Tensor]:
        asked.append(operation)
        return lambda x, *rest: reference.matmul(torch.ones(2, 96), *rest)

    monkeypatch.setattr(linear_file, "_kernel", kernel)
    parts = form.pack(matrix(70, 96))
    product = linear_file._on_device(elsewhere("cuda", 2, 96), form, dict(reversed(parts.items())), 70, 96, Scratch())
    check_product(product, torch.ones(2, 96), form.unpack(parts, 70, 96))
    assert asked == [operation]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_on_a_gpu(form: Format, dtype: torch.dtype) -> None:
    device, scratch = torch.device("cuda"), Scratch()
    for n, k in SHAPES:
        parts = {name: part.to(device) for name, part in form.pack(matrix(n, k)).items()}
        weight = form.unpack(parts, n, k)
        for dtype_of_values in (torch.bfloat16, torch.float32):
            values = dequantise(form, parts, (n, k), dtype_of_values, scratch)
            assert torch.equal(values, weight.to(dtype_of_values))
        rows = torch.randint(0, n, (9,), device=device)
        assert torch.equal(unpack_rows(form, parts, n, k, rows, dtype), weight[rows].to(dtype))
        for m in (1, 5, 70):
            x, bias = torch.randn(m, k, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
            limit = max(ROUNDING[dtype], 2.0**-9)  # a GPU multiplies float32 by tensor cores with 10 bits
            exact = x.double() @ weight.double().T + bias.double()
            most = x.double().abs() @ weight.double().abs().T + bias.double().abs()
            for y in (
                linear(x, form, parts, n, k, bias, scratch),
                by_tiles(x, form, parts, n, k, dtype, scratch).add_(bias),
            ):
                assert y.dtype is dtype
                assert ((y.double() - exact).abs() <= limit * most).all()


# --- the bench ---


def test_the_bench_measures_every_format(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts/bench_matmul.py"),
        "--smoke",
        "--threads=1",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == done.stdout
    table, _, line = done.stdout.rstrip("\n").rpartition("\n\n")
    assert "packed is faster up to" in table
    figures = json.loads(line)["figures"]
    assert {figure["format"] for figure in figures} == set(FORMATS)
    assert all(figure["ms"]["tiles"] > 0 and figure["ms"]["plain"] > 0 for figure in figures)
    assert any("packed" in figure["ms"] for figure in figures if figure["format"] == "int8-row")
