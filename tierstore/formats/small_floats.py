"""Rounding to floats of few bits, and the best of several scales for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class SmallFloat:
    """Floats with ``mantissa`` bits below the leading one, up to ``largest``.

    ``smallest`` is the least normal one, a power of two: below it, steps stay as they are there.
    """

    mantissa: int
    smallest: float
    largest: float

    def round_(self, values: Tensor, spare: Tensor) -> Tensor:
        """Float32 ``values``, rounded in place: ties to even, what lies beyond the largest to the largest.

        ``spare``, of the same shape and dtype, is lost.
        """
        values.clamp_(-self.largest, self.largest)
        torch.bitwise_and(values.view(torch.int32), EXPONENT_BITS, out=spare.view(torch.int32))
        # Beside 1.5 * 2^23 steps, float32 itself has steps of that size, and rounds to them, ties to even.
        spare.clamp_min_(self.smallest).mul_(1.5 * 2 ** (23 - self.mantissa))
        return values.add_(spare).sub_(spare)


E2M1 = SmallFloat(mantissa=1, smallest=1.0, largest=6.0)
E4M3 = SmallFloat(mantissa=3, smallest=2.0**-6, largest=448.0)


def best_scales(form: SmallFloat, values: Tensor, axis: int, candidates: Iterable[Tensor]) -> Tensor:
    """Of the ``candidates`` the scales with the least squared error of float32 ``values`` [a, b] along ``axis``.

    Each candidate has the shape of ``values`` with 1 in place of ``axis``, and so has the result. The first of equals.
    """
    near, spare = torch.empty_like(values), torch.empty_like(values)
    least = torch.full_like(values.narrow(axis, 0, 1), torch.inf)
    best = least
    for number, scales in enumerate(candidates):
        torch.div(values, scales, out=near)
        errors = squares_(form.round_(near, spare).mul_(scales).sub_(values), axis)
        best = torch.where(errors < least, scales, best) if number else scales
        least = torch.minimum(errors, least)
    return best


def squares_(values: Tensor, axis: int) -> Tensor:
    """Sums of squares along ``axis``, which is not empty and stays as 1: a view of ``values``, which are lost.

    Halves are added until one is left: unlike ``sum``, in the same order whatever the other axes and the threads are.
    """
    values.mul_(values)
    while (size := values.shape[axis]) > 1:
        half = size // 2
        if size % 2:
            values.narrow(axis, 0, 1).add_(values.narrow(axis, size - 1, 1))
        values.narrow(axis, 0, half).add_(values.narrow(axis, half, half))
        values = values.narrow(axis, 0, half)
    return values


def group_columns(tile: Tensor, group: int) -> Tensor:
    """``tile``, [rows, k], with each ``group`` of a row as a new column, [group, rows * k / group]: fast to work on."""
    return tile.reshape(-1, group).T.contiguous()


def e2m1_bytes(values: Tensor, rows: int) -> Tensor:
    """The codes of float32 ``values``, a ``group_columns``, as bytes uint8 [rows, k / 2]: the even column is low.

    Rounded as ``E2M1`` does; the sign is that of the value even where the code is zero.
    """
    signs = (values.view(torch.int32) >> 28).bitwise_and_(8)
    sizes = E2M1.round_(values.abs(), torch.empty_like(values))
    # The size's code is linear in each of the three binades, and the least of the three lines; the sum's last bits.
    lines = torch.minimum(sizes * 2, sizes + 2)
    codes = torch.minimum(lines, sizes.mul_(0.5).add_(4)).add_(2.0**23).view(torch.int32).bitwise_and_(7)
    eight = codes.bitwise_or_(signs).view(-1, 8, values.shape[1])
    four = eight[:, :4] | (eight[:, 4:] << 16)
    two = four[:, :2] | (four[:, 2:] << 8)
    words = two[:, 0] | (two[:, 1] << 4)
    return words.T.contiguous().view(torch.uint8).reshape(rows, -1)
