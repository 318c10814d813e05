"""What a packed matrix can become while its scales stay: the codes of each format as plain numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from tierstore.formats.format import Format, Parts
from tierstore.formats.fp4 import Fp4
from tierstore.formats.fp8 import Fp8
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.int8_row import Int8Row
from tierstore.formats.mxfp4 import MxFp4
from tierstore.formats.small_floats import E2M1, E4M3, e2m1_bytes
from tierstore.formats.tile64 import from_tile64, to_tile64
from tierstore.kernels.fp4_matmul.reference import e2m1_values
from tierstore.kernels.int8_matmul.reference import MIDDLE, PLANES, scales_and_zeros

FITS = 2
"""How often scales are fitted to the codes that they lead to: more gained nothing."""


def grid_of(form: Format, parts: Parts, n: int, k: int) -> Grid | None:
    """The grid that ``parts`` of a matrix [n, k] lie on; None for a format without scales."""
    match form:
        case Int4():
            scales, zeros = parts["scales"][:, :n].float().unbind(2)
            nibbles = from_tile64(parts["codes"])
            return _Int4(parts, form.group, nibbles[:n, :k].T.float() - 8, scales, zeros, nibbles)
        case Int8():
            scales, zeros = scales_and_zeros(parts["scales"], parts["steps"])[:, :n].float().unbind(2)
            whole = from_tile64(parts["high"]) * 16 + from_tile64(parts["low"])
            return _Int8(parts, form.group, whole[:n, :k].T.float() - MIDDLE, scales, zeros * PLANES, whole)
        case Int8Row() | Fp8():
            scales = parts["scales"].float().T
            kind = _Int8Row if isinstance(form, Int8Row) else _Fp8
            return kind(parts, max(k, 1), parts["codes"].float().T, scales, torch.zeros_like(scales))
        case Fp4() | MxFp4():
            scales = parts["scales"].float().T * parts.get("scale", 1)
            return _Fp4(parts, form.group, e2m1_values(parts["codes"]).T[:k], scales, torch.zeros_like(scales))
    return None


@dataclass(frozen=True)
class Grid(ABC):
    """The values ``code * scale + zero`` that the elements of a matrix [n, k] can have.

    All are float32: ``scales`` and ``zeros`` [groups, n], for ``group`` neighbouring columns each, and the ``codes`` of
    ``parts`` [k, n].
    """

    parts: Parts
    group: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def rounded(self, values: Tensor, columns: Tensor) -> Tensor:
        """The nearest codes of ``values`` [columns, n], which stand in these columns of the matrix."""
        groups = columns // self.group
        scales = self.scales[groups]
        return self.nearest((values - self.zeros[groups]) / torch.where(scales == 0, 1.0, scales))

    def values(self, codes: Tensor, columns: Tensor) -> Tensor:
        """What ``codes`` [columns, n] in these columns stand for."""
        groups = columns // self.group
        return torch.addcmul(self.zeros[groups], codes, self.scales[groups])

    def fitted(self, weights: Tensor, importance: Tensor) -> Self:
        """The grid, with scales and zeros nearer to ``weights`` [k, n] where a format allows any: in squares that count
        ``importance`` [k] times."""
        return self

    @staticmethod
    @abstractmethod
    def nearest(numbers: Tensor) -> Tensor:
        """The codes nearest to ``numbers``, which are lost."""

    @abstractmethod
    def encoded(self, codes: Tensor) -> dict[str, Tensor]:
        """The parts for ``codes`` [k, n]."""


@dataclass(frozen=True)
class _Int4(Grid):
    nibbles: Tensor

    @staticmethod
    def nearest(numbers: Tensor) -> Tensor:
        return numbers.round_().clamp_(-8, 7)

    def encoded(self, codes: Tensor) -> dict[str, Tensor]:
        nibbles, scales = self.nibbles.clone(), self.parts["scales"].clone()  # with what stands in the padding
        nibbles[: codes.shape[1], : codes.shape[0]] = codes.T + 8
        scales[:, : codes.shape[1]] = torch.stack((self.scales, self.zeros), dim=2)
        return {"codes": to_tile64(nibbles), "scales": scales}

    def fitted(self, weights: Tensor, importance: Tensor) -> Self:
        short = len(self.scales) * self.group - len(weights)
        values = pad(weights, (0, 0, 0, short)).view(-1, self.group, weights.shape[1])
        counts = pad(importance, (0, short)).view(-1, self.group, 1)
        best = self.scales, self.zeros
        codes, least = self._codes_and_errors(values, counts, *best)
        for _ in range(FITS):
            fit = _least_squares(codes, values, counts)
            codes, errors = self._codes_and_errors(values, counts, *fit)
            better = (errors < least) & (fit[0] > 0)
            best = torch.where(better, fit[0], best[0]), torch.where(better, fit[1], best[1])
            least = torch.minimum(errors, least)
        return replace(self, scales=best[0], zeros=best[1])

    def _codes_and_errors(self, values: Tensor, counts: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [groups, group, n] and the squares of their errors, [groups, n]."""
        safe = torch.where(scales == 0, 1.0, scales)[:, None]
        codes = self.nearest((values - zeros[:, None]) / safe)
        errors = torch.addcmul(zeros[:, None], codes, scales[:, None]).sub_(values).square_()
        return codes, errors.mul_(counts).sum(1)


@dataclass(frozen=True)
class _Int8(Grid):
    whole: Tensor

    @staticmethod
    def nearest(numbers: Tensor) -> Tensor:
        return numbers.round_().clamp_(-MIDDLE, 255 - MIDDLE)

    def encoded(self, codes: Tensor) -> dict[str, Tensor]:
        whole = self.whole.clone()
        whole[: codes.shape[1], : codes.shape[0]] = codes.T + MIDDLE
        return {**self.parts, "high": to_tile64(whole >> 4), "low": to_tile64(whole & 15)}


@dataclass(frozen=True)
class _Int8Row(Grid):
    @staticmethod
    def nearest(numbers: Tensor) -> Tensor:
        return numbers.round_().clamp_(-128, 127)

    def encoded(self, codes: Tensor) -> dict[str, Tensor]:
        return {**self.parts, "codes": codes.T.to(torch.int8).contiguous()}


@dataclass(frozen=True)
class _Fp8(Grid):
    @staticmethod
    def nearest(numbers: Tensor) -> Tensor:
        return E4M3.round_(numbers, torch.empty_like(numbers))

    def encoded(self, codes: Tensor) -> dict[str, Tensor]:
        return {**self.parts, "codes": codes.T.to(torch.float8_e4m3fn).contiguous()}


@dataclass(frozen=True)
class _Fp4(Grid):
    @staticmethod
    def nearest(numbers: Tensor) -> Tensor:
        return E2M1.round_(numbers, torch.empty_like(numbers))

    def encoded(self, codes: Tensor) -> dict[str, Tensor]:
        short = 2 * self.parts["codes"].shape[1] - len(codes)
        return {**self.parts, "codes": e2m1_bytes(pad(codes, (0, 0, 0, short)), codes.shape[1])}


def _least_squares(codes: Tensor, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [groups, n], as bfloat16 holds them, for which ``codes`` [groups, group, n] are nearest."""
    total = counts.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    code, value = (codes * counts).sum(1) / total, (values * counts).sum(1) / total
    apart = codes - code[:, None]
    spread = (apart * apart * counts).sum(1)
    scales = (apart * values * counts).sum(1) / torch.where(spread > 0, spread, 1.0)
    scales = scales.bfloat16().float()
    return scales, (value - scales * code).bfloat16().float()
