"""Scales and zeros of groups that make the squared error of rounded weights small.

A group's values come as float32 [groups, members, 64]: its members along the middle axis and 64 neighbouring rows along
the last, so that each step is one plain pass over memory (about 0.1 ns a weight in cache) whatever the group. Ranges,
scales and zeros are [groups, 64]. A group's choice depends on its own values only, not on what stands beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

Scratch = tuple[Tensor, Tensor]
"""Two tensors like the values, to be overwritten: memory that is reused need not be touched for the first time."""

TINY = 2.0**-100
"""A range below it counts as none: its scale would have no inverse in float32."""

CLIPS = ((1, 1), (0.92, 0.92), (0.84, 0.84), (1, 0.92), (0.92, 1), (0.84, 0.92), (0.92, 0.84))
"""How much of either half of a group's range 4-bit codes are laid over: of 64 normal values the ends are worth less
than finer steps between them. Wider sets gained 0.1 % on normal, Laplace and t-distributed values."""
REFITS = 1
"""How often the best of those is fitted to its codes once more; a second time gained 0.2 %."""


def as_bfloat16(values: Tensor) -> Tensor:
    """The nearest that bfloat16 holds, as float32."""
    return values.to(torch.bfloat16).to(torch.float32)


def inverse(values: Tensor) -> Tensor:
    """``1 / values``, and 0 where they are 0. Not for many: torch's comparisons and choices are slow."""
    return torch.where(values == 0, 0.0, values.reciprocal())


def least(errors: Tensor) -> Tensor:
    """The number of the least of ``errors`` [candidates, groups, 64], int64 [1, groups, 64]; the first of equals.

    Errors, which are lost, count as equal where they agree in 18 bits; at most 32 candidates.
    """
    # In the last bits of its error each candidate carries its number to the least: floats that are not negative have
    # the order of their bits, and torch's argmin along the first axis takes a hundred times as long.
    numbers = torch.arange(len(errors), dtype=torch.int32, device=errors.device)[:, None, None]
    bits = errors.clamp_(min=0).view(torch.int32).bitwise_and_(~31).bitwise_or_(numbers)
    return bits.amin(0, keepdim=True).bitwise_and_(31).to(torch.int64)


def best_of(errors: Tensor, *choices: Tensor) -> tuple[Tensor, ...]:
    """Of ``choices``, each [candidates, groups, 64] like ``errors``, those of the ``least`` error."""
    best = least(errors)
    return tuple(choice.gather(0, best)[0] for choice in choices)


def affine4(values: Tensor, low: Tensor, high: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15, float32 in ``scratch[0]``, and their scales and zeros: ``(code - 8) * scale + zero``.

    ``low`` and ``high`` are the range of each group; ``values`` are lost. Scales and zeros are float32 that bfloat16
    holds: they are rounded before their error is computed.

    As in Lloyd's method, codes follow from a scale and a zero, and a better scale and zero from the codes, by least
    squares. From ``CLIPS`` it starts in several places, as either step only ever finds the nearest minimum.
    """
    centre = as_bfloat16(low * 0.5 + high * 0.5)
    half = torch.maximum(high - centre, centre - low)
    half = torch.where(half < TINY, 0.0, half)
    # Now values lie in [-1, 1], so that no sum of squares overflows or cancels, whatever the weights are.
    values.sub_(centre[:, None]).mul_(inverse(half)[:, None])
    fit = Fit4(values, centre, half, scratch)
    scale, zero = fit.best(*fit.covering(CLIPS))
    for _ in range(REFITS):
        scale, zero = fit.best(scale[None], zero[None])
    return fit.codes(*fit.in_units(scale, zero)).add_(8), scale, zero


class Fit4:
    """Scales and zeros for ``values`` that are ``(weight - centre) / half``, which is called units here."""

    def __init__(self, values: Tensor, centre: Tensor, half: Tensor, scratch: Scratch) -> None:
        self._values, self._centre, self._half = values, centre, half
        self._unit = inverse(half)
        self._codes, self._products = scratch
        self._members = values.shape[1]
        self._sum = values.sum(1)
        self._squares = torch.mul(values, values, out=self._products).sum(1)

    def in_units(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The step and the zero of the values that ``scale`` and ``zero`` of the weights are."""
        return scale * self._unit, (zero - self._centre) * self._unit

    def covering(self, clips: tuple[tuple[float, float], ...]) -> tuple[Tensor, Tensor]:
        """Scales and zeros with codes from ``-below`` to ``above`` for each pair of ``clips``, [clips, groups, 64]."""
        below, above = self._half.new_tensor(clips)[:, :, None, None].unbind(1)
        zeros = as_bfloat16((8 * above - 7 * below) / 15 * self._half + self._centre)
        # Where the zero could not be held, as far from zero as 256 times the range, the scale makes up for it.
        zero = (zeros - self._centre) * self._unit
        return as_bfloat16(torch.maximum((above - zero) / 7, (zero + below) / 8) * self._half), zeros

    def codes(self, step: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, -8 to 7."""
        factor = step.clamp(min=1e-6).reciprocal_()  # where it is 0 so are the values
        codes = torch.addcmul((-zero * factor)[:, None], self._values, factor[:, None], out=self._codes)
        return codes.round_().clamp_(-8, 7)

    def best(self, scales: Tensor, zeros: Tensor) -> tuple[Tensor, ...]:
        """Of scales and zeros [candidates, groups, 64], and of what least squares makes of each, the best.

        The error of a fit is computed for the codes it was made from: the nearest codes can only be better.
        """
        steps, offsets = self.in_units(scales, zeros)
        # Of each candidate the sums of code, code * code and code * value: every error is a polynomial in them.
        sums, squares, products = (torch.empty_like(steps) for _ in range(3))
        for number, candidate in enumerate(zip(steps, offsets, strict=True)):
            codes = self.codes(*candidate)
            torch.sum(codes, 1, out=sums[number])
            torch.sum(torch.mul(codes, self._values, out=self._products), 1, out=products[number])
            torch.sum(codes.mul_(codes), 1, out=squares[number])
        spread = (self._members * squares - sums * sums).clamp_(min=0.5)  # integers: 0 where all codes are the same
        fitted = ((self._members * products - sums * self._sum) / spread).clamp_(min=0)
        means = (self._sum - fitted * sums) / self._members
        fitted_scales, fitted_zeros = as_bfloat16(fitted * self._half), as_bfloat16(means * self._half + self._centre)
        errors = [
            step * (step * squares + 2 * (zero * sums - products)) + zero * (self._members * zero - 2 * self._sum)
            for step, zero in ((steps, offsets), self.in_units(fitted_scales, fitted_zeros))
        ]
        return best_of(
            torch.cat(errors).add_(self._squares), torch.cat((scales, fitted_scales)), torch.cat((zeros, fitted_zeros))
        )
