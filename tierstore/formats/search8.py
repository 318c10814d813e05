"""Scale codes and zero codes of groups of 8-bit codes that make their squared error small."""

from __future__ import annotations

import torch
from torch import Tensor

from tierstore.formats.search import TINY, as_bfloat16, best_of, least
from tierstore.kernels.int8_matmul.reference import MIDDLE, PLANES, ZERO_STEP

SCALES = 8
"""How many scale codes a group tries, from the one that covers its range on. With 12 the squared error of normal values
was 1 % less."""
TOP_CODE = 248
"""The scale code that covers the widest range of a row. Those up to 255 are left to be tried."""
LEAST, MOST = -MIDDLE, 255 - MIDDLE
"""The least and the most code, counted from the middle."""
LEAST_ZERO, MOST_ZERO = -126, 125
"""The least and the most zero code, less 128, with neighbours that can be tried too."""


def needed_step(low: Tensor, high: Tensor) -> Tensor:
    """The least scale with which 256 codes and some zero code reach from ``low`` to ``high``."""
    far = torch.maximum(high / (MOST + MOST_ZERO * ZERO_STEP), low / (LEAST + LEAST_ZERO * ZERO_STEP))
    need = torch.maximum((high - low) / 255, far)
    return torch.where(need < TINY, 0.0, need)


def affine8(values: Tensor, low: Tensor, high: Tensor, steps: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 255, float32 in ``memory``, and scale codes and zero codes: see ``kernels.int8_matmul.reference``.

    ``low`` and ``high`` are the range of each group, ``steps`` [64] what one scale code of a row is worth. ``memory``
    is of one axis, for twice the values or more: where it is for many times them, that saves time.

    With so many codes the error of a group is mere chance, and a scale a few codes coarser costs less than the best of
    32 draws gains.
    """
    steps = torch.where(steps == 0, 1.0, steps)  # a row of zeros, for which any scale does
    fit = Fit8(values, low, high, steps, memory)
    scale_code, zero_code = fit.best()
    codes = fit.codes(*fit.line(fit.scales(scale_code), zero_code))
    return codes.round_().clamp_(0, 255), scale_code, zero_code + 128


class Fit8:
    """The choice of a scale code and a zero code for ``values``: see ``affine8``.

    ``scale_codes`` [SCALES, groups, 64] cover the range. ``zero_codes`` [4, SCALES, groups, 64] are less 128: that in
    the middle of the range, the next, the nearer of those two away, and the one before.
    """

    def __init__(self, values: Tensor, low: Tensor, high: Tensor, steps: Tensor, memory: Tensor) -> None:
        self._values, self._steps = values, steps
        self._memory = memory[: max(len(memory) // 2 // values.numel(), 2) * values.numel()].view(-1, *values.shape)
        first = torch.ceil(needed_step(low, high) / steps)
        self.scale_codes = (first + torch.arange(SCALES, device=first.device)[:, None, None]).clamp_(1, 255)
        self._scales = self.scales(self.scale_codes)
        factors = self._scales.reciprocal()
        # In codes: the middle of the range less that of the codes, and how far the range reaches from there.
        self._middle = ((low + high) * 0.5 * factors).sub_((LEAST + MOST) / 2)
        self._reach = (high - low).mul_(0.5) * factors
        # Where the codes leave room the zero is drawn towards zero, so that a group of zeros is packed exactly.
        room = (127 - self._reach).clamp_(min=0)
        wanted = (self._middle - torch.clamp(self._middle, -room, room)).div_(ZERO_STEP)
        self.zero_codes = wanted.new_empty((4, *wanted.shape))
        nearest, after, beyond, before = self.zero_codes.unbind(0)
        torch.round(wanted, out=nearest).clamp_(LEAST_ZERO, MOST_ZERO)
        torch.add(nearest, 1, out=after)
        torch.add(nearest, torch.copysign(wanted.new_tensor(2), wanted.sub_(nearest)), out=beyond)
        torch.sub(nearest, 1, out=before)

    def best(self) -> tuple[Tensor, Tensor]:
        """A scale code and a zero code, [groups, 64]: what is likely the best of all, or what is surely better."""
        errors = self.estimates()
        sure_error, sure_scale, sure_zero = best_of(errors[0], errors[0], self.scale_codes, self.zero_codes[0])
        number = least(errors.flatten(0, 1))
        scale_code = self.scale_codes.gather(0, number % SCALES)[0]
        zero_code = self.zero_codes.flatten(0, 1).gather(0, number)[0]
        surely = sure_error < self.error(scale_code, zero_code)
        return torch.where(surely, sure_scale, scale_code), torch.where(surely, sure_zero, zero_code)

    def error(self, scale_code: Tensor, zero_code: Tensor) -> Tensor:
        """The squared error of each group, [groups, 64], in units of ``steps``, in which no square overflows."""
        scale = self.scales(scale_code)
        codes = self.codes(*self.line(scale, zero_code))
        rounded = torch.round(codes, out=self._memory[1]).clamp_(0, 255)
        return codes.sub_(rounded).square_().sum(1).mul_(scale.div_(self._steps).square_())

    def estimates(self) -> Tensor:
        """About the ``error`` for all ``zero_codes``, of their shape.

        Each zero code has the codes a quarter of a scale on from where the one before has them, so that one pass over
        the values tells of all four. With t the place of a value between one middle of two codes, 0, and the next, 1,
        the error of that with codes at ``level + 1/2`` is the sum of ``(t - level - 1/2)^2 - 2 (max(t, level) - t)``.
        The sum of squares is that for which the four make 1/12 a value in the mean, which they do but for hundredths.
        Unknown is how the zeros' rounding to bfloat16 moves the codes of all but the first, which matters far from 0.
        """
        factors, offsets = self.line(self._scales, self.zero_codes[0])
        offsets.add_(0.5)
        sums = factors.new_empty(self.zero_codes.shape)
        for first in range(0, SCALES, len(self._memory)):
            some = slice(first, first + len(self._memory))
            places = self.codes(factors[some], offsets[some]).frac_()
            torch.sum(places, -2, out=sums[0, some])
            for level in (1, 2, 3):
                torch.sum(places.clamp_(min=level / 4), -2, out=sums[level, some])
        n, total = self._values.shape[1], sums[0]
        squares = sums.sum(0).mul_(0.5).sub_(total, alpha=0.25)
        errors = (self.zero_codes * ZERO_STEP).sub_(self._middle).abs_().add_(self._reach)
        errors.sub_(128).clamp_(min=0).mul_(2)  # what the end of the range adds where it is off by over half a code
        for level, error in enumerate(errors):
            error.add_(squares).add_(total, alpha=1 - level / 2).sub_(sums[level], alpha=2)
            error.add_(((level / 4 + 1 / 2) ** 2 + 1 / 12 - 27 / 32) * n)
        return errors.mul_((self._scales / self._steps).square_())

    def scales(self, scale_codes: Tensor) -> Tensor:
        """What scale codes are worth."""
        return as_bfloat16(self._steps * scale_codes)

    def line(self, scales: Tensor, zero_codes: Tensor) -> tuple[Tensor, Tensor]:
        """The factors and offsets that make codes of values."""
        factors = scales.reciprocal()
        zeros = as_bfloat16((scales * zero_codes).mul_(ZERO_STEP).div_(PLANES))
        return factors, zeros.mul_(-PLANES).mul_(factors).add_(MIDDLE)

    def codes(self, factors: Tensor, offsets: Tensor) -> Tensor:
        """The codes of the values, neither rounded nor clamped, for [groups, 64] or several of these; valid until the
        next call."""
        out = self._memory[0] if factors.ndim == 2 else self._memory[: len(factors)]
        return torch.addcmul(offsets.unsqueeze(-2), self._values, factors.unsqueeze(-2), out=out)
