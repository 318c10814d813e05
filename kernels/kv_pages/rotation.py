"""The rotation of keys, queries and values before they are packed: outliers of one channel are spread over all.

For sizes that are powers of two it is the Hadamard matrix, for others the Hartley matrix (Bracewell 1983): both are
orthogonal, symmetric, and so their own inverse, and no entry is larger than ``sqrt(2 / dim)``. Scores do not change, as
``(q R) @ (k R).T = q @ k.T``. Rotation against outliers: QuaRot (Ashkboos et al. 2024, arXiv 2404.00456).
"""

from __future__ import annotations

from functools import lru_cache
from math import pi, sqrt

import torch
from torch import Tensor


def rotate(states: Tensor) -> Tensor:
    """``states`` [n, ..., dim] rotated, in their dtype; multiplied in float32. Twice gives them back but for rounding.

    Each of the n is multiplied on its own, so that its bits do not depend on how many there are."""
    if states.numel() == 0:
        return states
    matrix = rotation(states.shape[-1], states.device).expand(len(states), -1, -1)
    flat = states.reshape(len(states), -1, states.shape[-1])
    return torch.bmm(flat.float(), matrix).view(states.shape).to(states.dtype)


@lru_cache(maxsize=32)
def rotation(dim: int, device: torch.device) -> Tensor:
    """The matrix, float32 [dim, dim]. Not to be written to."""
    steps = torch.arange(dim)
    if dim & (dim - 1) == 0:
        matrix = torch.ones(1, 1)
        while len(matrix) < dim:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return (matrix / sqrt(dim)).to(device)
    angles = (steps[:, None] * steps % dim).double() * (2 * pi / dim)
    return ((angles.cos() + angles.sin()) / sqrt(dim)).float().to(device)
