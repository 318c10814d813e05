"""How numbers become codes of few bits: the scale and the zero that some have in common, and the nearest codes.

All is float32, each step rounds once, and sums are added in an order that is written down: so another machine, or a
kernel, finds the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

TINY = 2.0**-100
"""A scale below it is 0: it would have no inverse in float32."""
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
        return (codes if self.dtype.is_floating_point else codes.round_()).to(self.dtype), scales.bfloat16()

    def values(self, codes: Tensor) -> Tensor:
        """What is multiplied by the scale: float32 if the codes are floats."""
        return codes.float() if self.dtype.is_floating_point else codes


@dataclass(frozen=True)
class ByRange(ABC):
    """Codes of few bits with a scale and a zero, laid over a part ``clips`` of the range of values: the part with the
    least squared error, as the ends are worth less than finer steps between them."""

    clips: tuple[float, ...]

    def nearest(self, states: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Codes, uint8 [n, H, T, D], and scales and zeros, bfloat16 [n, H, 2, D or T], of ``states`` float32 [n, H, T,
        D], for what lies along ``axis``: 2, of which the first does not count, or 3."""
        counted = states[:, :, 1:] if axis == 2 else states
        low, high = (found(axis, keepdim=True) for found in (counted.amin, counted.amax))
        middle, half = low * 0.5 + high * 0.5, (high - low) * 0.5
        best = self._covering(middle, half, self.clips[0])
        least = self._errors(counted, *best, axis)
        for clip in self.clips[1:]:
            pair = self._covering(middle, half, clip)
            errors = self._errors(counted, *pair, axis)
            better = errors < least
            best = torch.where(better, pair[0], best[0]), torch.where(better, pair[1], best[1])
            least = torch.where(better, errors, least)
        return self._codes(states, *best).to(torch.uint8), torch.stack(
            [each.squeeze(axis) for each in best], 2
        ).bfloat16()

    def _covering(self, middle: Tensor, half: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        zeros, scales = self._laid_over(middle, half * clip)
        zeros, scales = zeros.bfloat16().float(), _usable(scales)
        good = zeros.isfinite() & scales.isfinite()
        return torch.where(good, scales, torch.nan), torch.where(good, zeros, torch.nan)

    def _codes(self, states: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return self._rounded((states - zeros).mul_(_inverse(scales)).nan_to_num_(0.0))

    def _errors(self, states: Tensor, scales: Tensor, zeros: Tensor, axis: int) -> Tensor:
        found = self.values(self._codes(states, scales, zeros)).mul_(scales).add_(zeros).sub_(states)
        return halved_sum(found.square_(), axis)

    @staticmethod
    @abstractmethod
    def values(codes: Tensor) -> Tensor:
        """What ``codes``, whole numbers of any dtype, are before scale and zero: of the same dtype, or float32."""

    @abstractmethod
    def _laid_over(self, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        """The zero, and the scale, with which codes reach from ``middle - half`` to ``middle + half``."""

    @abstractmethod
    def _rounded(self, numbers: Tensor) -> Tensor:
        """The nearest codes as float32, of numbers that are lost."""


@dataclass(frozen=True)
class Whole(ByRange):
    """Codes 0 to ``most``."""

    most: int

    @staticmethod
    def values(codes: Tensor) -> Tensor:
        return codes

    def _laid_over(self, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        return middle - half, half * (2 / self.most)

    def _rounded(self, numbers: Tensor) -> Tensor:
        return numbers.clamp_(0, self.most).round_()


@dataclass(frozen=True)
class E2m1(ByRange):
    """Codes of floats with 2 bits of exponent and 1 of mantissa; bit 3 is the sign."""

    @staticmethod
    def values(codes: Tensor) -> Tensor:
        codes = codes.float()
        sizes = torch.where(codes < 8, codes, codes - 8)
        doubled = torch.maximum(torch.maximum(sizes, sizes * 2 - 4), sizes * 4 - 16)
        return torch.where(codes < 8, doubled, -doubled).mul_(0.5)

    def _laid_over(self, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        return middle, half * (1 / 6)

    def _rounded(self, numbers: Tensor) -> Tensor:
        signs = (numbers < 0).float() * 8
        return sum(((numbers.abs() > bound).float() for bound in E2M1_BOUNDS), start=signs)


CODES: Mapping[str, ByRange] = MappingProxyType(
    {
        "int4": Whole((1.0, 0.95, 0.9, 0.85, 0.8), 15),
        "fp4": E2m1((1.0, 0.93, 0.87, 0.8, 0.74)),
        "int2": Whole((1.0, 0.9, 0.8, 0.7, 0.6, 0.5), 3),
    }
)
BYTES: Mapping[str, ByToken] = MappingProxyType(
    {"int8": ByToken(127, torch.int8), "fp8": ByToken(448, torch.float8_e4m3fn)}
)


def halved_sum(values: Tensor, axis: int) -> Tensor:
    """The sum along ``axis``, which stays as 1: the second half is added to the first until one is left, as if zeros
    followed up to a power of two. ``values`` are lost."""
    while (size := values.shape[axis]) > 1:
        half = 1 << (size - 1).bit_length() - 1
        values.narrow(axis, 0, size - half).add_(values.narrow(axis, half, size - half))
        values = values.narrow(axis, 0, half)
    return values


def _usable(scales: Tensor) -> Tensor:
    """As bfloat16 holds them, in float32: 0 where they are tiny, NaN where they are not finite."""
    held = scales.bfloat16().float()
    return torch.where(held < TINY, 0.0, torch.where(held.isfinite(), held, torch.nan))


def _inverse(scales: Tensor) -> Tensor:
    """0 where there is none."""
    return torch.where(scales > 0, scales.reciprocal(), 0.0)
