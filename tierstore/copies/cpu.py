"""Compute and store share host memory: a copy is done when it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from tierstore.contracts import Buffer, Fence


class Done:
    """The fence of work that is complete."""

    __slots__ = ()

    def done(self) -> bool:
        """Always true."""
        return True

    def wait(self) -> None:
        """Return at once."""

    def gate(self) -> None:
        """Return at once."""


DONE = Done()


class CpuCopyEngine:
    """Copies on the calling thread. Torch on the CPU computes while the call lasts, so every mark is complete."""

    unified = True

    def copy(self, pairs: Sequence[tuple[Buffer, Buffer]], *, after: Sequence[Fence] = ()) -> Fence:
        """Wait for ``after``, then copy each ``(src, dst)``. Raises ``ValueError`` when their sizes differ."""
        check_sizes(pairs)
        for fence in after:
            fence.wait()
        for src, dst in pairs:
            cast(torch.Tensor, dst).copy_(cast(torch.Tensor, src))
        return DONE

    def mark(self) -> Fence:
        """Complete at once."""
        return DONE

    def close(self) -> None:
        """Nothing is under way, ever."""


def check_sizes(pairs: Sequence[tuple[Buffer, Buffer]]) -> None:
    """Raises ``ValueError`` unless both sides of every pair have the same number of bytes."""
    for src, dst in pairs:
        if src.numel() != dst.numel():
            raise ValueError(f"a copy of {src.numel()} bytes to {dst.numel()}: slice both to the same size")
