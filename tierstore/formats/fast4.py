"""Products of few rows with int4 and int8 weights by integer arithmetic, compiled for this processor by llvmlite.

The input is rounded to integers, with a unit for each group of columns that shares a scale: to 8 bits for int4, whose
weights are coarser than that, and to 15 bits for int8. For 8 bits that is what llama.cpp does with its ``Q8`` blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from tierstore.formats.format import Format, Parts
from tierstore.formats.scratch import Scratch
from tierstore.kernels.int4_matmul.reference import ROWS

LEAST_NBYTES = 1 << 17
"""Of codes for each thread: with fewer, waking it would take longer than it saves."""


PARTS = {1: ("codes", "scales"), 2: ("low", "high", "scales", "steps")}
"""Of a matrix, by digits of the rounded input, in the order of the fields of a job."""


@cache
def can_compile() -> bool:
    """Whether llvmlite is installed and the processor has AVX2: does not change while a process runs."""
    if find_spec("llvmlite") is None:
        return False
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx2"))


def fast_product(x: Tensor, form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] on a CPU where ``can_compile``; ``form`` is int4, of
    any group, or int8.

    What is multiplied is ``round_input`` of ``x``. Sums over a group are exact integers, those of groups are added in
    their order in float32: so a row of the product depends on nothing but that row of ``x`` and on ``W``, and is the
    same with any number of threads. A row of ``x`` with a value that is not finite makes a row of NaN. As many threads
    compute as torch may use.
    """
    m, digits = x.shape[0], 2 if form.name == "int8" else 1
    if k % form.group:
        x = pad(x, (0, form.group - k % form.group))
    groups, device, code = x.shape[1] // form.group, x.device, _compiled(digits)
    values = x.float().contiguous()
    rounded = scratch.take("rounded input", (m, groups, digits, form.group), torch.int8, device)
    factors = scratch.take("factors of input", (m, groups), torch.float32, device)
    sums = scratch.take("sums of input", (m, groups), torch.int32, device)
    into = rounded.data_ptr(), factors.data_ptr(), sums.data_ptr()
    code.round_groups(values.data_ptr(), m * groups, form.group, *into)
    own = [parts[name].contiguous() for name in PARTS[digits]]
    codes, blocks = own[0], own[0].shape[0]
    out = torch.empty(blocks, m, ROWS, dtype=torch.float32, device=device)
    addresses = *(part.data_ptr() for part in own), *into, out.data_ptr()
    threads = min(torch.get_num_threads(), 1 + codes.numel() * digits // LEAST_NBYTES)
    code.multiply(threads, *addresses, m, groups, form.group, blocks)
    product = out.to(x.dtype)
    product = product.view(1, -1) if m == 1 else product.transpose(0, 1).reshape(m, -1)
    return product if product.shape[1] == n else product[:, :n].contiguous()


class _Compiled:
    """Machine code, which lives as long as this object."""

    def __init__(self, digits: int) -> None:
        from llvmlite import binding

        from tierstore.formats.fast4_code import write

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        target = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
        )
        module = binding.parse_assembly(str(write(digits)))
        passes = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        self._engine = binding.create_mcjit_compiler(module, target)
        self._engine.finalize_object()
        self._multiply = self._engine.get_function_address("multiply")
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._alone = ctypes.CFUNCTYPE(None, pointer)(self._multiply)
        self.round_groups = ctypes.CFUNCTYPE(None, pointer, number, number, pointer, pointer, pointer)(
            self._engine.get_function_address("round_groups")
        )

    def multiply(self, threads: int, *fields: int) -> None:
        """Carry out a job, of fields in the order that the code says, with some threads, this one among them."""
        job = (ctypes.c_int64 * (len(fields) + 1))(*fields, 0)
        together = _parallel() if threads > 1 else None
        if together is None:
            self._alone(job)
        else:
            together(self._multiply, job, threads, 0)


@cache
def _compiled(digits: int) -> _Compiled:
    return _Compiled(digits)


@cache
def _parallel() -> Callable[..., None] | None:
    """Runs a function with the threads that torch itself computes with; None where these are not OpenMP's.

    Others would compete for the cores with torch's, which spin for a while after each operation.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return function
