"""Writes functions for LLVM that compute with vectors of 256 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

LANES = 8
"""32-bit numbers in a vector of 256 bits."""

NAN = 0x7FC0
"""Of bfloat16, whatever the bits that rounding would carry into."""

I8, I16, I32, I64, F32 = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType())
BYTES, WORDS, INTS, FLOATS = (
    ir.VectorType(I8, 4 * LANES),
    ir.VectorType(I16, 2 * LANES),
    ir.VectorType(I32, LANES),
    ir.VectorType(F32, LANES),
)


class Code(ir.IRBuilder):  # type: ignore[misc]  # llvmlite has no types
    """A builder with words for what is said often."""

    def __init__(self, module: ir.Module, function: ir.Function) -> None:
        super().__init__(function.append_basic_block("entry"))
        self._module = module

    def word(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def all_of(self, vector: Any, value: float) -> Any:
        return ir.Constant(vector, [value] * vector.count)

    def splat(self, value: Any, count: int) -> Any:
        nothing = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
        first = self.insert_element(nothing, value, ir.Constant(I32, 0))
        return self.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, count), [0] * count))

    def pointer(self, number: Any, to: Any) -> Any:
        return self.inttoptr(number, to.as_pointer())

    def read(self, what: Any, pointer: Any, at: Any) -> Any:
        """``what``, from element ``at`` of what ``pointer`` points to, of any alignment."""
        value = self.load(self.bitcast(self.gep(pointer, [at]), what.as_pointer()))
        value.align = 1
        return value

    def write(self, value: Any, pointer: Any, at: Any) -> None:
        self.store(value, self.bitcast(self.gep(pointer, [at]), value.type.as_pointer())).align = 1

    def read_floats(self, pointer: Any, at: Any) -> Any:
        """8 values of float32, of float16, or of bfloat16, which is the upper half of float32."""
        if pointer.type.pointee is F32:
            return self.read(FLOATS, pointer, at)
        if isinstance(pointer.type.pointee, ir.HalfType):
            return self.fpext(self.read(ir.VectorType(pointer.type.pointee, LANES), pointer, at), FLOATS)
        halves = self.zext(self.read(ir.VectorType(I16, LANES), pointer, at), INTS)
        return self.bitcast(self.shl(halves, self.all_of(INTS, 16)), FLOATS)

    def write_floats(self, values: Any, pointer: Any, at: Any) -> None:
        """Float32, or the nearest of bfloat16."""
        if pointer.type.pointee is not F32:
            there = self.fcmp_unordered("uno", values, values)
            upper = self.lshr(self.bitcast(self.to_bfloat16(values), INTS), self.all_of(INTS, 16))
            values = self.trunc(self.select(there, self.all_of(INTS, NAN), upper), ir.VectorType(I16, LANES))
        self.write(values, pointer, at)

    def prefetch(self, bytes_: Any, at: Any) -> None:
        """Byte ``at`` for reading, into every cache; it need not be there."""
        hints = (ir.Constant(I32, hint) for hint in (0, 3, 1))
        self.call_named("llvm.prefetch.p0", ir.VoidType(), self.gep(bytes_, [at]), *hints)

    def interleave(self, these: Any, those: Any, quarter: int) -> Any:
        """Pairs of bytes: the first (or second) 8 of each 16 bytes of ``these``, each before that of ``those``."""
        order = [
            side * 4 * LANES + upper * 2 * LANES + quarter * LANES + number
            for upper in (0, 1)
            for number in range(LANES)
            for side in (0, 1)
        ]
        return self.shuffle_vector(these, those, ir.Constant(ir.VectorType(I32, len(order)), order))

    def half(self, vector: Any, upper: int) -> Any:
        count = vector.type.count // 2
        order = list(range(upper * count, (upper + 1) * count))
        return self.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, count), order))

    def to_bfloat16(self, values: Any) -> Any:
        """Float32 that bfloat16 holds: the nearest, and of two the even one."""
        bits = self.bitcast(values, INTS)
        odd = self.and_(self.lshr(bits, self.all_of(INTS, 16)), self.all_of(INTS, 1))
        bits = self.add(bits, self.add(odd, self.all_of(INTS, 0x7FFF)))
        return self.bitcast(self.and_(bits, self.all_of(INTS, -0x10000)), FLOATS)

    def reduced(self, vectors: Sequence[Any]) -> Any:
        """The sum of all their elements, halves of them at a time."""
        whole, *others = vectors
        for other in others:
            whole = self.fadd(whole, other)
        while whole.type.count > 1:
            whole = self.fadd(self.half(whole, 0), self.half(whole, 1))
        return self.extract_element(whole, ir.Constant(I32, 0))

    def alloca_once(self, type_: Any) -> Any:
        """Room for a value, taken when the function is entered, and not again in a loop."""
        with self.goto_entry_block():
            return self.alloca(type_)

    def intrinsic(self, name: str, type_: Any, *arguments: Any) -> Any:
        return self.call_named(f"{name}.v{LANES}f32", type_, *arguments)

    def call_named(self, name: str, result: Any, *arguments: Any) -> Any:
        function = self._module.globals.get(name) or ir.Function(
            self._module, ir.FunctionType(result, [argument.type for argument in arguments]), name
        )
        return self.call(function, arguments)

    @contextmanager
    def loop(self, stop: Any, step: int = 1) -> Iterator[Any]:
        """The numbers from 0 below ``stop``, which is above 0."""
        before, body, after = self.block, self.append_basic_block("loop"), self.append_basic_block("after")
        self.branch(body)
        self.position_at_end(body)
        number = self.phi(I64)
        number.add_incoming(self.word(0), before)
        yield number
        following = self.add(number, self.word(step))
        number.add_incoming(following, self.block)
        self.cbranch(self.icmp_unsigned("<", following, stop), body, after)
        self.position_at_end(after)


def write_carry_out(module: ir.Module, first: Any | None, work: Any) -> None:
    """``carry_out(job, threads, parallel)``: ``first(job)`` if there is such a function, then ``work(job)`` in
    ``threads`` threads of ``parallel``, which has the arguments of ``GOMP_parallel``, or in this one alone where that
    is 0."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I32, I64]), "carry_out")
    code = Code(module, function)
    job, threads, parallel = function.args
    if first is not None:
        code.call(first, [job])
    together, alone, end = (function.append_basic_block(name) for name in ("together", "alone", "end"))
    code.cbranch(code.icmp_unsigned("!=", parallel, code.word(0)), together, alone)
    code.position_at_end(together)
    starter = ir.FunctionType(ir.VoidType(), [work.type, I64.as_pointer(), I32, I32])
    code.call(code.pointer(parallel, starter), [work, job, threads, ir.Constant(I32, 0)])
    code.branch(end)
    code.position_at_end(alone)
    code.call(work, [job])
    code.branch(end)
    code.position_at_end(end)
    code.ret_void()
