"""Machine code for this processor, compiled by llvmlite, and the threads that run it: those of torch."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import Any


@cache
def can_compile() -> bool:
    """Whether llvmlite is installed and the processor has AVX2: does not change while a process runs."""
    if find_spec("llvmlite") is None:
        return False
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx2"))


class MachineCode:
    """The function ``carry_out(job, threads, parallel)`` of a module for LLVM; lives as long as this object."""

    def __init__(self, module: Any) -> None:
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        target = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
        )
        parsed = binding.parse_assembly(str(module))
        passes = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(parsed, passes)
        self._engine = binding.create_mcjit_compiler(parsed, target)
        self._engine.finalize_object()
        self._carry_out = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64)(
            self._engine.get_function_address("carry_out")
        )

    def carry_out(self, threads: int, *fields: int) -> None:
        """Carry out a job, of fields in the order that the code says, with some threads, this one among them."""
        job = (ctypes.c_int64 * (len(fields) + 2))(*fields)  # and two counters, which begin at 0
        self._carry_out(job, threads, _parallel() if threads > 1 else 0)


def rest_between_work() -> None:
    """Let OpenMP's threads sleep while they wait for work, as long as the calling thread lives.

    They spin for milliseconds first, beside whoever needs their cores, unless there are more of them than processors
    (the manual of libgomp, GOMP_SPINCOUNT): so the calling thread gets one that has nothing to do. Where the threads of
    torch are others this does nothing."""
    address = _parallel()
    if address:
        parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(address)
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # to free no memory
        parallel(nothing, None, 2, 0)


@cache
def _parallel() -> int:
    """The address of what runs a function with the threads that torch itself computes with; 0 where these are not
    OpenMP's.

    Others would compete for the cores with torch's, which spin for a while after each operation.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
