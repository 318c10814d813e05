"""Products with packed weights beside the plain one, and beside what reading the weights alone would take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu.rates import timed
from gpu.settings import Settings
from tierstore.formats.format import Format
from tierstore.formats.linear import MATMULS
from tierstore.formats.named import format_named

FORMATS = ("int4", "int8", "int8-row", "fp8", "fp4", "mxfp4")
ROWS = (1, 16, 256, 2048)
"""Of the input: a token, some at once, and two lengths of a prompt."""
CACHES_NBYTES = 512 << 20
"""Weights of one size together are more than this, so that no cache holds them from one product to the next."""
_RESERVE_SECONDS = 8.0
"""A format that would be begun with less than this left is left out."""

Run = Callable[[], Tensor]


@torch.inference_mode()
def measure(settings: Settings) -> dict[str, Any]:
    """For each format and number of rows: seconds of a product, of the plain one, and of moving the bytes alone."""
    if find_spec("triton") is None:
        return {"skipped": "triton is not installed: packed weights are unpacked by tiles instead"}
    until = time.perf_counter() + settings.seconds
    device = torch.device(settings.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # of this process; triton was not imported yet
    n, k = (64, 128) if settings.smoke else (8192, 8192)
    rows = (1, 5) if settings.smoke else ROWS
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, device=device, dtype=dtype, generator=generator)
    inputs = [torch.randn(count, k, device=device, dtype=dtype, generator=generator) for count in rows]
    memory = _memory_rate(device, 1 << 20 if settings.smoke else CACHES_NBYTES)
    plain = list(_plain(weight, inputs, device))
    products: list[dict[str, Any]] = []
    left_out = []
    for name in FORMATS:
        if time.perf_counter() > until - _RESERVE_SECONDS and products:
            left_out.append(name)
            continue
        for found, seconds in zip(_packed(format_named(name), weight, inputs, device), plain, strict=True):
            roofline = found["nbytes"] / memory
            products.append({"format": name, **found, "plain_seconds": seconds, "roofline_seconds": roofline})
    return {"weights": [n, k], "memory_rate": memory, "products": products, "left_out": left_out}


def _packed(form: Format, weight: Tensor, inputs: Sequence[Tensor], device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds, bytes and relative difference of the products of ``weight`` in ``form`` with each input."""
    operation, names = MATMULS[type(form)]
    kernels = import_module(f"tierstore.kernels.{operation}.triton")
    packed = form.pack(weight)
    n, k = weight.shape
    more = (form.group,) if form.name == "int4" else ()
    parts = [packed[name] for name in names]
    nbytes = sum(part.nbytes for part in parts)
    copies = [[part.clone() for part in parts] for _ in range(_copies(nbytes, device))]
    unpacked = form.unpack(packed, n, k)
    for x in inputs:
        product = kernels.matmul(x, *parts, n, *more)
        exact = x.float() @ unpacked.T
        runs = [partial(kernels.matmul, x, *own, n, *more) for own in copies]
        yield {
            "rows": len(x),
            "seconds": _seconds_each(runs, device),
            "call_seconds": _call_seconds(runs[0], device),
            "nbytes": nbytes + x.nbytes + product.nbytes,
            "difference": float((product.float() - exact).norm() / exact.norm()),
        }


def _plain(weight: Tensor, inputs: Sequence[Tensor], device: torch.device) -> Iterator[float]:
    """Seconds of the product of ``weight`` itself with each input."""
    copies = [weight.clone() for _ in range(_copies(weight.nbytes, device))]
    for x in inputs:
        yield _seconds_each([partial(torch.mm, x, own.T) for own in copies], device)


def _copies(nbytes: int, device: torch.device) -> int:
    return 2 if device.type == "cpu" else -(-CACHES_NBYTES // nbytes) + 1


def _seconds_each(runs: Sequence[Run], device: torch.device) -> float:
    """Of one run, when they follow each other as fast as the device can: on a GPU replayed from a graph."""
    runs[0]()  # is compiled, or chosen
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        every: Callable[[], Any] = graph.replay
        every()
    else:

        def every() -> None:
            for run in runs:
                run()

    return min(timed(device, every) for _ in range(_rounds(device))) / len(runs)


def _call_seconds(run: Run, device: torch.device) -> float:
    """Of one call as Python makes it, with the same weights each time."""
    count = 4 * _rounds(device)

    def several() -> None:
        for _ in range(count):
            run()

    return timed(device, several) / count


def _memory_rate(device: torch.device, nbytes: int) -> float:
    """Bytes per second that are read and written when memory is copied."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    there = torch.zeros_like(source)
    there.copy_(source)
    return 2 * nbytes / min(timed(device, lambda: there.copy_(source)) for _ in range(_rounds(device)))


def _rounds(device: torch.device) -> int:
    return 1 if device.type == "cpu" else 5
