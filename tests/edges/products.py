"""Weights of each format that a kernel multiplies with, at random, and how far from the exact product it may be.

Codes of every format are exact in bfloat16 and float16, and sums are float32. So what a product may be off by is what
adding in float32 costs, and its own rounding: much less than if weights were rounded on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import cast

import torch
from torch import Generator, Tensor

from tierstore.kernels.blocks import Blocks, blocks_of_rows, blocks_of_tiles

Parts = tuple[Tensor, ...]


def up(count: int, step: int) -> int:
    return -(-count // step) * step


def whole(generator: Generator, least: int, most: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Random numbers from ``least`` to ``most``."""
    return torch.randint(least, most + 1, shape, generator=generator, device=generator.device, dtype=dtype)


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def int4(group: int) -> Callable[[int, int, Generator], Parts]:
    def parts(n: int, k: int, generator: Generator) -> Parts:
        codes = whole(generator, 0, 255, up(n, 64) // 64, up(k, group) * 32)
        return codes, normal(generator, up(k, group) // group, up(n, 64), 2).bfloat16()

    return parts


def int8(n: int, k: int, generator: Generator) -> Parts:
    tiles, width = up(n, 64) // 64, up(k, 64)
    high, low = (whole(generator, 0, 255, tiles, width * 32) for _ in range(2))
    return high, low, whole(generator, 0, 255, tiles, width * 2), normal(generator, up(n, 64), 1).abs() / 1000


def int8_row(n: int, k: int, generator: Generator) -> Parts:
    return whole(generator, -128, 127, n, k, dtype=torch.int8), normal(generator, n, 1).bfloat16()


def e4m3(generator: Generator, *shape: int) -> Tensor:
    """All codes but those that are not a number."""
    return (whole(generator, 0, 126, *shape) + 128 * whole(generator, 0, 1, *shape)).view(torch.float8_e4m3fn)


def fp8(n: int, k: int, generator: Generator) -> Parts:
    return e4m3(generator, n, k), normal(generator, n, 1)


def fp4(n: int, k: int, generator: Generator) -> Parts:
    groups = up(k, 16) // 16
    return whole(generator, 0, 255, n, groups * 8), e4m3(generator, n, groups), normal(generator, 1, 1)


def mxfp4(n: int, k: int, generator: Generator) -> Parts:
    """With scales that float16 has room for."""
    groups = up(k, 32) // 32
    return whole(generator, 0, 255, n, groups * 16), whole(generator, 116, 134, n, groups).view(torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Case:
    """A format: where its kernels are, how its parts are made, and what else ``matmul`` and ``unpack`` are told. If its
    weights are in tiles, columns have scales in common ``span`` by ``span``, and zeros; its first ``planes`` parts are
    codes in nibbles then."""

    operation: str
    parts: Callable[[int, int, Generator], Parts]
    more: tuple[int, ...] = ()
    span: int = 0
    planes: int = 0

    def unpack(self, parts: Parts, n: int, k: int) -> Tensor:
        reference = import_module(f"tierstore.kernels.{self.operation}.reference")
        return cast(Tensor, reference.unpack(*parts, n, k, *self.more))

    def terms(self, parts: Parts, n: int, k: int) -> Tensor:
        """What is added for each weight, as magnitudes, float32 [n, k]: kernels multiply by code and by zero apart, and
        where the two nearly cancel each is much more than the weight. The zeros are what the middle codes mean."""
        middle = [torch.full_like(part, 0x88) for part in parts[: self.planes]]
        zeros = self.unpack((*middle, *parts[self.planes :]), n, k) if self.planes else torch.zeros(())
        return (self.unpack(parts, n, k) - zeros).abs() + zeros.abs()

    def blocks(self, m: int, n: int, k: int, *, exact: bool = False) -> Blocks:
        return blocks_of_tiles(m, n, k, self.span, exact=exact) if self.span else blocks_of_rows(m, n, k, exact=exact)


CASES = {
    "int4-g32": Case("int4_matmul", int4(32), (32,), 32, planes=1),
    "int4": Case("int4_matmul", int4(64), (64,), 64, planes=1),
    "int4-g128": Case("int4_matmul", int4(128), (128,), 64, planes=1),
    "int8": Case("int8_matmul", int8, (), 64, planes=2),
    "int8-row": Case("int8_row_matmul", int8_row),
    "fp8": Case("fp8_matmul", fp8),
    "fp4": Case("fp4_matmul", fp4),
    "mxfp4": Case("mxfp4_matmul", mxfp4),
}


def compare(case: Case, product: Tensor, x: Tensor, parts: Parts, n: int) -> None:
    """With the product in float64, up to its rounding and that of float32 sums."""
    assert product.dtype == x.dtype
    weights, terms = case.unpack(parts, n, x.shape[1]), case.terms(parts, n, x.shape[1])
    exact = x.double() @ weights.double().T
    assert product.shape == exact.shape
    if not x.numel() or not weights.numel():
        assert not product.any()
        return
    rounding = exact.abs() * torch.finfo(x.dtype).eps / 2
    adding = x.double().abs().sum(1, keepdim=True) * terms.amax(1)
    wrong = (product.double() - exact).abs() > 1.001 * rounding + 2.0**-20 * adding
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} are wrong, first at {wrong.nonzero()[0].tolist()}"
