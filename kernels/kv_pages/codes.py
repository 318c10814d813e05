"""How numbers become codes of few bits: the scale and the zero that some have in common, and the nearest codes.

All is float32 and each step rounds once, so another machine, or a kernel, finds the same bits. A search for the scale
with the least squared error, over six shares of the range, gained nothing for 4 bits and nothing over the best share
for 2 bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

TINY, HUGE = 2.0**-100, 2.0**100
"""A scale below is 0, as it would have no inverse in float32; one above is not a number, as sums might be infinite."""
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Above each of them the next of 0, 0.5, 1, 1.5, 2, 3, 4, 6 is nearer."""


@dataclass(frozen=True)
class ByToken:
    """Codes of 8 bits up to ``most``, of ``dtype``, with one scale for each token of a head."""

    most: float
    dtype: torch.dtype

    def nearest(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [n, H, T, D] and scales bfloat16 [n, H, T] of ``states`` float32 [n, H, T, D]."""
        scales = _usable(states.abs().amax(3).mul_(1 / self.most))
        codes = (states * _inverse(scales)[..., None]).nan_to_num_(0.0).clamp_(-self.most, self.most)
        return (codes if self.dtype.is_floating_point else codes.round_()).to(self.dtype), to_bfloat16(scales)

    def values(self, codes: Tensor) -> tuple[Tensor, float]:
        """Numbers, and what they are multiplied by beside the scale."""
        if not self.dtype.is_floating_point:
            return codes, 1.0
        # The bits where float16 has them; its exponents begin 8 lower. A cast takes torch ten times as long.
        bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
        return bits.bitwise_and_(-0x4080).view(torch.float16), 2.0**8


@dataclass(frozen=True)
class ByRange(ABC):
    """Codes of few ``bits`` up to the number ``most``, with a scale and a zero, laid over the middle ``share`` of the
    range of values: with very few codes the ends are worth less than finer steps between them."""

    bits: int
    most: int
    share: float

    def nearest(self, states: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Codes, uint8 [n, H, T, D], and scales and zeros, bfloat16 [n, H, 2, D or T], of ``states`` float32 [n, H, T,
        D], for what lies along ``axis``: 2, of which the first does not count, or 3."""
        counted = states[:, :, 1:] if axis == 2 else states
        low, high = counted.amin(axis, keepdim=True), counted.amax(axis, keepdim=True)
        zeros, scales = self._laid_over(low * 0.5 + high * 0.5, (high - low) * (0.5 * self.share))
        zeros, scales = zeros.bfloat16().float(), _usable(scales)
        good = zeros.isfinite() & scales.isfinite()
        zeros, scales = (torch.where(good, each, torch.nan) for each in (zeros, scales))
        codes = self._rounded((states - zeros).mul_(_inverse(scales)).nan_to_num_(0.0))
        pairs = torch.stack((scales.squeeze(axis), zeros.squeeze(axis)), 2)
        return codes.to(torch.uint8), to_bfloat16(pairs)

    @abstractmethod
    def values(self, folded: Tensor, piece: int) -> tuple[Tensor, float]:
        """Numbers, and what they are multiplied by beside the scale, of the codes in bits ``piece * bits`` and up."""

    @abstractmethod
    def _laid_over(self, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        """The zero, and the scale, with which codes reach from ``middle - half`` to ``middle + half``."""

    @abstractmethod
    def _rounded(self, numbers: Tensor) -> Tensor:
        """The nearest codes as float32, of numbers that are lost."""


@dataclass(frozen=True)
class Whole(ByRange):
    """Codes 0 to ``most``."""

    def values(self, folded: Tensor, piece: int) -> tuple[Tensor, float]:
        return (folded >> piece * self.bits).bitwise_and_(self.most), 1.0

    def _laid_over(self, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        return middle - half, half * (2 / self.most)

    def _rounded(self, numbers: Tensor) -> Tensor:
        return numbers.clamp_(0, self.most).round_()


@dataclass(frozen=True)
class E2m1(ByRange):
    """Codes of floats with 2 bits of exponent and 1 of mantissa; bit 3 is the sign."""

    def values(self, folded: Tensor, piece: int) -> tuple[Tensor, float]:
        high = folded if piece else folded << 4
        # The bits where float16 has them; its exponents begin 14 lower. A table takes torch several times as long.
        bits = high.view(torch.int8).to(torch.int16).bitwise_left_shift_(5)
        return bits.bitwise_and_(-0x7200).view(torch.float16), 2.0**14

    def _laid_over(self, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        return middle, half * (1 / self.most)

    def _rounded(self, numbers: Tensor) -> Tensor:
        codes, sizes = (numbers < 0).float().mul_(8), numbers.abs_()
        for bound in E2M1_BOUNDS:
            codes.add_(sizes > bound)
        return codes


CODES: Mapping[str, ByRange] = MappingProxyType(
    {"int4": Whole(4, 15, 1.0), "fp4": E2m1(4, 6, 1.0), "int2": Whole(2, 3, 0.8)},
)
BYTES: Mapping[str, ByToken] = MappingProxyType(
    {"int8": ByToken(127, torch.int8), "fp8": ByToken(448, torch.float8_e4m3fn)},
)


def to_bfloat16(values: Tensor) -> Tensor:
    """The nearest bfloat16. What is not a number has the same bits on any machine: torch's casts do not agree."""
    return values.bfloat16().masked_fill_(values.isnan(), torch.nan)


def _usable(scales: Tensor) -> Tensor:
    """As bfloat16 holds them, in float32: 0 where they are tiny, NaN where they are huge or not a number."""
    held = scales.bfloat16().float()
    return torch.where(held < TINY, 0.0, torch.where(held <= HUGE, held, torch.nan))


def _inverse(scales: Tensor) -> Tensor:
    """0 where there is none."""
    return torch.where(scales > 0, scales.reciprocal(), 0.0)
