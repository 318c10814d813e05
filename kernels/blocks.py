"""How a product is divided into programs: by its sizes alone, so that no run and no card adds in another order."""

from __future__ import annotations

from dataclasses import dataclass, replace

LEAST_COLUMNS, LEAST_STEPS = 256, 2
"""Of a split: with fewer, to add the splits would take as long as to multiply."""


@dataclass(frozen=True)
class Blocks:
    """What one program has: ``m`` rows of the input by ``n`` rows of the weights, ``k`` columns a step, threads in
    ``warps`` of 32; and ``width`` columns of each of ``splits``, of which the last may have fewer."""

    m: int
    n: int
    k: int
    warps: int
    width: int = 0
    splits: int = 1

    def programs(self, m: int, n: int) -> int:
        """How many blocks [m, n] has."""
        return -(-m // self.m) * -(-n // self.n)

    def split(self, m: int, n: int, k: int, *, enough: int) -> Blocks:
        """With columns split as long as there are no more than ``enough`` programs, a few for each multiprocessor."""
        steps = -(-k // self.k)
        most = k // max(LEAST_COLUMNS, LEAST_STEPS * self.k)
        splits = max(1, min(enough // self.programs(m, n), most))
        width = -(-steps // splits) * self.k
        return replace(self, width=width, splits=-(-k // width))


def blocks_of_rows(m: int, n: int, k: int, *, exact: bool) -> Blocks:
    """Blocks, none of them empty, of [m, k] by weights [n, k] that are stored row by row.

    ``exact`` products are those of float32, which tensor cores do not make. Blocks were chosen by what the compiler
    makes of them: instructions for each weight, no registers spilled in the loop, and at most 64 KiB of shared memory.
    """
    if m == 1:
        return Blocks(1, 16, 512, 4).split(m, n, k, enough=1024)
    if m <= 16:
        return Blocks(16, 64, 128, 4).split(m, n, k, enough=512)
    if exact:
        return Blocks(64, 64, 64, 4).split(m, n, k, enough=256)
    if m <= 64:
        return Blocks(64, 128, 64, 4).split(m, n, k, enough=256)
    return Blocks(128, 256, 32, 8).split(m, n, k, enough=128)


def blocks_of_tiles(m: int, n: int, k: int, span: int, *, exact: bool) -> Blocks:
    """The same for weights in tiles of 64 rows, whose columns have scales in common ``span`` by ``span``."""
    if m == 1:
        return Blocks(1, 64, 4 * span, 4).split(m, n, k, enough=1024)
    if m <= 16:
        return Blocks(16, 64, span, 4).split(m, n, k, enough=512)
    if m <= 64 or exact:
        return Blocks(64, 64, span, 4).split(m, n, k, enough=256)
    return Blocks(128, 128, span, 8).split(m, n, k, enough=128)
