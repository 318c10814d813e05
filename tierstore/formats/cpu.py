"""Products with torch's own kernels for packed weights, and which way is worth it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tierstore.formats.format import Format, Parts
from tierstore.formats.scales import int8_pairs, words
from tierstore.formats.scratch import Scratch
from tierstore.formats.tile64 import HALF, to_tile32, to_tile64
from tierstore.kernels.int4_matmul.reference import ROWS

aten = torch.ops.aten


MOST_ROWS: Mapping[int, Mapping[str, int]] = {
    64: {"int4": 40, "int8": 20, "int8-row": 14},
    32: {"int4": 10, "int8": 5, "int8-row": 16},
}
"""Up to how many rows torch's kernels are the faster way, by ``int4_tile_rows``, which tells AVX-512 from AVX2."""


FAST_ROWS: Mapping[int, Mapping[str, int]] = {
    64: {"int4": 8, "int8": 2},
    32: {"int4": 128, "int8": 24},
}
"""Up to how many rows ``fast_product`` is the fastest way, by ``int4_tile_rows``. Measured with AVX2 only: with AVX-512
it is up to where torch's kernel would win if our rows cost what they do with AVX2."""


CHUNK = 1 << 23
"""Weights whose scales are made ready for torch's int4 kernel at a time."""


@lru_cache(maxsize=4096)
def choose(
    name: str, rows: int, n: int, k: int, dtype: torch.dtype, tile_rows: int, compiler: bool
) -> Literal["fast", "packed", "tiles"]:
    """How to multiply ``rows`` rows of ``dtype`` with a matrix [n, k] of the format ``name`` on a CPU.

    "packed" is torch's kernel for the format, which reads few bytes but is slow for each row; "tiles" unpacks some rows
    of the matrix at a time, and multiplies these with the fast product of plain matrices; "fast" is ``fast_product``,
    which needs a compiler. ``tile_rows`` is what ``int4_tile_rows`` says, ``compiler`` what ``can_compile`` does. On
    purpose this is a table of measurements (``scripts/bench_matmul.py``) and no measurement while running: the ways
    round differently, and the same product must be the same on every run. Where they meet hardly depends on ``n``, nor
    on ``k`` but for what the kernels can do.
    """
    if compiler and dtype is torch.bfloat16 and rows <= FAST_ROWS.get(tile_rows, {}).get(_kind(name), 0):
        return "fast"
    if not can_be_packed(name, k, dtype, tile_rows):
        return "tiles"
    # A plain product even where it is the slower way: it is then that of the unpacked module, to the bit.
    return "packed" if name == "bf16" or rows <= MOST_ROWS[tile_rows][_kind(name)] else "tiles"


def can_be_packed(name: str, k: int, dtype: torch.dtype, tile_rows: int) -> bool:
    """Whether torch has a kernel for the format ``name`` and rows of ``k`` values of ``dtype``."""
    if dtype is not torch.bfloat16:
        return False  # for float32 and float16 the kernels of torch 2.13 are plain loops, 30 times slower
    if name == "int8-row" and k % 16:
        return False  # that kernel reads and writes beyond the ends then, seen in torch 2.13
    return name == "bf16" or _kind(name) in MOST_ROWS.get(tile_rows, ())


def _kind(name: str) -> str:
    return name.partition("-g")[0]


def arithmetic(dtype: torch.dtype, rows: int) -> torch.dtype:
    """What tiles are unpacked to, for a product with ``rows`` rows of ``dtype`` on a CPU.

    float16 has no fast product. Nor has bfloat16 without AVX-512, and for a single row rounding a tile to it takes
    longer than it saves.
    """
    if dtype is torch.float64 or (dtype is torch.bfloat16 and rows > 1 and _has_avx512()):
        return dtype
    return torch.float32


@cache
def int4_tile_rows() -> int:
    """Rows of the tiles that torch's int4 kernel reads on this machine: 64, 32, or 0 for any other layout.

    A property of the processor, and of torch, that does not change while a process runs. Seen by packing a small
    matrix, whatever torch says that it uses.
    """
    nibbles = torch.arange(ROWS * ROWS, dtype=torch.int32, device="cpu").mul_(40503).bitwise_right_shift_(9)
    nibbles = nibbles.bitwise_and_(15).view(ROWS, ROWS)
    try:
        packed = aten._convert_weight_to_int4pack_for_cpu(nibbles, 1).view(-1)
    except (AttributeError, RuntimeError):
        return 0
    tiles = to_tile64(nibbles.to(torch.uint8))
    for rows, layout in ((ROWS, tiles), (ROWS // 2, to_tile32(tiles))):
        if torch.equal(packed, layout.view(-1)):
            return rows
    return 0


@cache
def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def packed_product(x: Tensor, form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Tensor:
    """``x @ W.T``, bfloat16 [m, n], for contiguous bfloat16 ``x`` [m, k], where ``choose`` said "packed"."""
    if form.name == "bf16":
        return linear(x, parts["codes"])
    if form.name == "int8-row":
        return torch._weight_int8pack_mm(x, parts["codes"], parts["scales"].view(-1))
    if k % form.group:
        x = pad(x, (0, form.group - k % form.group))
    if form.name != "int8" and int4_tile_rows() == ROWS:
        product = _int4_product(x, parts["codes"], parts["scales"], form.group)
    else:
        product = _by_chunks(x, form, parts, scratch)
    return product if product.shape[1] == n else product[:, :n].contiguous()


def _by_chunks(x: Tensor, form: Format, parts: Parts, scratch: Scratch) -> Tensor:
    """Some blocks of 64 rows at a time, so that what their scales become stays small."""
    m, columns = x.shape
    blocks = parts["low" if form.name == "int8" else "codes"].shape[0]
    step = max(1, CHUNK // (columns * ROWS))
    if blocks <= step:
        return _chunk(x, form, parts, scratch)
    product = x.new_empty(m, blocks * ROWS)
    for first in range(0, blocks, step):
        some, rows = slice(first, first + step), slice(first * ROWS, (first + step) * ROWS)
        own = {name: part[some] for name, part in parts.items() if name in ("codes", "high", "low")}
        if form.name == "int8":
            own |= {"scales": parts["scales"][some], "steps": parts["steps"][rows]}
        else:
            own |= {"scales": parts["scales"][:, rows]}
        product[:, rows] = _chunk(x, form, own, scratch)
    return product


def _chunk(x: Tensor, form: Format, parts: Parts, scratch: Scratch) -> Tensor:
    if form.name != "int8":
        return _int4_product(x, parts["codes"], parts["scales"], form.group)
    scales = int8_pairs(words(parts["scales"], torch.int16), parts["steps"], scratch)
    low, high = (_int4_product(x, parts[plane], scales, form.group) for plane in ("low", "high"))
    return low.add_(high, alpha=16)


def _int4_product(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    if int4_tile_rows() == ROWS:
        return cast(Tensor, aten._weight_int4pack_mm_for_cpu(x, codes.view(-1, x.shape[1] // 2), group, scales))
    return _by_halves(x, codes, scales, group)


def _by_halves(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """The int4 product of a kernel that reads tiles of 32 rows.

    What is one column to us, 32 bytes, is two columns to it. The first half of these bytes are then 32 rows with zeros
    at every odd column of ``x``, the second half another 32 rows with zeros at every even one. That is twice the
    arithmetic, and a third of the time that turning the codes around would take.
    """
    blocks, m, columns = codes.shape[0], x.shape[0], x.shape[1]
    rows = blocks * HALF
    spread = x.new_zeros(2, m, columns, 2)
    spread[0, :, :, 0] = x
    spread[1, :, :, 1] = x
    own = scales.view(-1, blocks, 2, 2, 16, 2).permute(3, 0, 1, 2, 4, 5).reshape(2, -1, rows, 2)
    product = x.new_empty(m, blocks, 2, 2, 16)
    for half in (0, 1):
        there = aten._weight_int4pack_mm_for_cpu(
            spread[half].view(m, 2 * columns), codes.view(rows, columns), 2 * group, own[half]
        )
        product[:, :, :, half] = there.view(m, blocks, 2, 16)
    return product.view(m, -1)
