#!/usr/bin/env python
"""How fast bfloat16 weights come back from lossless compression: the reason why there is no such format.

The exponents of weights carry about 2.6 bits of entropy; sign and mantissa do not compress. So the exponents are
compressed apart, as a plane of bytes, by the codecs that zarr brings. Streaming gains by that only where unpacking is
faster than the disk. Prints a table: bytes as a share of the plain ones, and plain bytes per second out of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numcodecs import blosc
from numpy.typing import NDArray

CHUNK = 1 << 20
"""Weights that are compressed together, and unpacked by one thread at a time."""
CODECS = {
    "lz4": blosc.Blosc("lz4", 1, blosc.Blosc.NOSHUFFLE),
    "lz4, bits transposed": blosc.Blosc("lz4", 1, blosc.Blosc.BITSHUFFLE, typesize=1),
    "zstd": blosc.Blosc("zstd", 1, blosc.Blosc.NOSHUFFLE),
    "zstd, bits transposed": blosc.Blosc("zstd", 1, blosc.Blosc.BITSHUFFLE, typesize=1),
}
Bytes = NDArray[np.uint8]


def split(weights: NDArray[np.uint16]) -> tuple[Bytes, Bytes]:
    """The exponents, and what is left: sign and mantissa in a byte."""
    exponents = (weights >> 7 & 0xFF).astype(np.uint8)
    return exponents, (weights >> 8 & 0x80 | weights & 0x7F).astype(np.uint8)


def join(exponents: torch.Tensor, rest: torch.Tensor, out: torch.Tensor) -> None:
    """The weights again, int16, in few passes over memory."""
    out.copy_(rest.view(torch.int8)).bitwise_and_(-32641)  # the sign, which fills the upper byte, and the mantissa
    out.bitwise_or_(exponents.to(torch.int16).bitwise_left_shift_(7))


def unpack(codec: blosc.Blosc, chunk: tuple[bytes, Bytes], plane: Bytes, out: torch.Tensor) -> None:
    """One chunk, with ``plane`` as memory for its exponents."""
    codec.decode(chunk[0], plane)
    join(torch.from_numpy(plane), torch.from_numpy(chunk[1]), out)


def measure(weights: torch.Tensor, threads: int) -> Iterator[tuple[str, float, float]]:
    """Name, share of bytes, and plain bytes per second of each codec."""
    chunks = [split(chunk) for chunk in weights.view(torch.int16).numpy().view(np.uint16).reshape(-1, CHUNK)]
    planes = [np.empty(CHUNK, np.uint8) for _ in chunks]
    out = torch.empty(weights.numel(), dtype=torch.int16)
    blosc.set_nthreads(1)  # threads take chunks instead
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for name, codec in CODECS.items():
            packed = [(codec.encode(exponents), rest) for exponents, rest in chunks]
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                list(pool.map(partial(unpack, codec), packed, planes, out.view(-1, CHUNK)))
                seconds.append(time.perf_counter() - start)
            assert torch.equal(out, weights.view(torch.int16))
            share = sum(len(one) + rest.nbytes for one, rest in packed) / (2 * weights.numel())
            yield name, share, 2 * weights.numel() / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=64, help="of 2 MiB of weights (default: 64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: every core")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    weights = torch.randn(chosen.chunks * CHUNK).mul_(0.02).bfloat16()
    for name, share, rate in measure(weights, chosen.threads):
        print(f"{name:<22}  {share:.3f} of the bytes  {rate / 2**30:.2f} GiB/s")


if __name__ == "__main__":
    main()
