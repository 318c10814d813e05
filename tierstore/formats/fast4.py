"""Products of few rows with int4 and int8 weights by integer arithmetic, compiled for this processor by llvmlite.

The input is rounded to integers, with a unit for each group of columns that shares a scale: to 8 bits for int4, whose
weights are coarser than that, and to 15 bits for int8. For 8 bits that is what llama.cpp does with its ``Q8`` blocks.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tierstore.extents import align_up
from tierstore.formats.format import Format, Parts
from tierstore.formats.scratch import Scratch
from tierstore.kernels.int4_matmul.reference import ROWS
from tierstore.kernels.machine_code import MachineCode

ALIGN = 64
"""Bytes of a cache line, and more than a vector."""

LEAST_NBYTES = 1 << 17
"""Of codes for each thread: with fewer, waking it would take longer than it saves."""

_COMPUTED = (torch.bfloat16, torch.float32)  # others are converted

PARTS = {1: ("codes", "scales"), 2: ("low", "high", "scales", "steps")}
"""Of a matrix, by digits of the rounded input, in the order of the fields of a job."""


def fast_product(x: Tensor, form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [..., n], for ``x`` [..., k] on a CPU that ``can_compile`` for; ``form`` is
    int4, of any group, or int8.

    What is multiplied is ``round_input`` of ``x``. Sums over a group are exact integers, those of groups are added in
    their order in float32: so a row of the product depends on nothing but that row of ``x`` and on ``W``, and is the
    same with any number of threads. A row of ``x`` with a value that is not finite makes a row of NaN. As many threads
    compute as torch may use.
    """
    group, digits = form.group, 2 if form.name == "int8" else 1
    values = x if x.dtype in _COMPUTED else x.float()
    if k % group:
        values = pad(values, (0, group - k % group))
    values = values.contiguous()
    own = [parts[name].contiguous() for name in PARTS[digits]]
    layout = _layout(values.numel(), values.shape[-1], group, digits, own[0].shape[0], torch.get_num_threads())
    memory = scratch.take("fast product", (layout.nbytes,), torch.uint8, x.device).data_ptr()
    product = values.new_empty(*x.shape[:-1], own[0].shape[0] * ROWS)
    _compiled(digits, halves=values.dtype is torch.bfloat16).carry_out(
        layout.threads,
        *[part.data_ptr() for part in own],
        *[memory + offset for offset in layout.offsets],
        *layout.counts,
        values.data_ptr(),
        product.data_ptr(),
    )
    if n % ROWS:
        product = product[..., :n].contiguous()
    return product if x.dtype in _COMPUTED else product.to(x.dtype)


class _Layout(NamedTuple):
    """``counts`` of a job; ``nbytes`` of memory to work with, and where its parts begin; how many ``threads`` have
    enough to do."""

    counts: tuple[int, ...]
    nbytes: int
    offsets: tuple[int, ...]
    threads: int


@lru_cache(maxsize=1024)
def _layout(values: int, columns: int, group: int, digits: int, blocks: int, most_threads: int) -> _Layout:
    """Of a job with so many ``values`` of input."""
    rows, groups = values // columns, columns // group
    threads = min(most_threads, 1 + blocks * ROWS * columns * digits // 2 // LEAST_NBYTES)
    # the rounded input, its factors and sums, and totals in float32
    sizes = (values * digits, 4 * rows * groups, 4 * rows * groups, 4 * threads * rows * ROWS)
    ends = tuple(accumulate(align_up(size, ALIGN) for size in sizes))
    return _Layout((rows, groups, group, blocks), ends[-1], (0, *ends[:-1]), threads)


@cache
def _compiled(digits: int, *, halves: bool) -> MachineCode:
    from tierstore.formats.fast4_code import write

    return MachineCode(write(digits, halves=halves))
