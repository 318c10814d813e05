"""The code of products with nibbles and rounded input, written for LLVM: eight rows of a matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from tierstore.formats.tile64 import HALF
from tierstore.kernels.int4_matmul.reference import ROWS
from tierstore.kernels.int8_matmul.reference import PLANES, ZERO_STEP
from tierstore.kernels.vector_code import (
    BYTES,
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    WORDS,
    Code,
    write_carry_out,
)

STEP = 16
"""Columns whose products are added in 16 bits: 16 * 15 * 128 is below 2 ** 15."""

DIGIT_BITS = 7
"""A digit of the rounded input counts 128 times the one behind it."""

CACHE_LINE = 64

AHEAD = 64
"""Columns, 2 KiB of codes, that are asked for before they are needed: processors' own guesses end with each page."""

NIBBLES = {1: ("codes",), 2: ("low", "high")}
SCALES = {1: ("scales",), 2: ("scales", "steps")}
OTHERS = ("input", "factors", "sums", "totals", "rows", "groups", "group", "blocks", "x", "product")
"""Fields of a job, 64 bits each: by planes the parts of the matrix, then what all have. Behind them are the number of
the first block of 64 rows that nobody has begun, and that of the threads that have begun.

Of ``x`` [rows, groups * group] and ``product`` [rows, blocks * 64] the values are float32 or bfloat16. The others are
memory to work with: ``input`` int8 [rows, groups, digits, group], ``factors`` float32 and ``sums`` int32
[rows, groups], ``totals`` float32 [threads, rows, 64]."""


def write(planes: int, *, halves: bool) -> ir.Module:
    """A module of ``carry_out``, for int4 (1 plane, input of 1 digit) or int8 (2 and 2), of float32 or, with
    ``halves``, of bfloat16."""
    module = ir.Module(f"fast4_{planes}")
    write_carry_out(module, _write_round_groups(module, planes, halves), _write_multiply(module, planes, halves))
    return module


def _write_round_groups(module: ir.Module, digits: int, halves: bool) -> Any:
    """``round_groups(job)``: ``x`` as integers.

    ``factors`` is a unit of each group; ``input`` how many of these, the greater digit first; ``sums`` all of a group.
    What is not finite makes the factor so.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "round_groups")
    function.linkage = "internal"
    code = Code(module, function)
    field = _fields(code, function.args[0], digits)
    group, count = field["group"], code.mul(field["rows"], field["groups"])
    x = code.pointer(field["x"], I16 if halves else F32)
    rounded = code.pointer(field["input"], I8)
    factors, sums = code.pointer(field["factors"], F32), code.pointer(field["sums"], I32)
    most, total = code.alloca(FLOATS), code.alloca(INTS)
    exact, limit = (I8, 127.0) if digits == 1 else (I16, 127.0 * 2**DIGIT_BITS)
    with code.loop(count) as number:
        own = code.gep(x, [code.mul(number, group)])
        code.store(code.all_of(FLOATS, 0.0), most)
        with code.loop(group, LANES) as column:
            size = code.intrinsic("llvm.fabs", FLOATS, code.read_floats(own, column))
            code.store(code.intrinsic("llvm.maximum", FLOATS, code.load(most), size), most)
        greatest = code.call_named("llvm.vector.reduce.fmaximum.v8f32", F32, code.load(most))
        factor = code.fdiv(greatest, ir.Constant(F32, limit))
        code.store(factor, code.gep(factors, [number]))
        code.store(code.all_of(INTS, 0), total)
        with code.loop(group, LANES) as column:
            units = code.fdiv(code.read_floats(own, column), code.splat(factor, LANES))
            # Among denormal numbers a factor may be much too small.
            units = code.intrinsic("llvm.minimum", FLOATS, units, code.all_of(FLOATS, limit))
            units = code.intrinsic("llvm.maximum", FLOATS, units, code.all_of(FLOATS, -limit))
            units = code.intrinsic("llvm.roundeven", FLOATS, units)
            narrow = ir.VectorType(exact, LANES)
            # 0 / 0 is not a number, and becomes 0.
            whole = code.call_named(f"llvm.fptosi.sat.v8i{exact.width}.v8f32", narrow, units)
            code.store(code.add(code.load(total), code.sext(whole, INTS)), total)
            into = code.gep(rounded, [code.mul(code.mul(number, code.word(digits)), group)])
            if digits == 2:
                half, bits = (code.all_of(narrow, v) for v in (1 << (DIGIT_BITS - 1), DIGIT_BITS))
                upper = code.ashr(code.add(whole, half), bits)
                code.write(code.trunc(upper, ir.VectorType(I8, LANES)), into, column)
                whole = code.trunc(code.sub(whole, code.shl(upper, bits)), ir.VectorType(I8, LANES))
                into = code.gep(into, [group])
            code.write(whole, into, column)
        together = code.call_named("llvm.vector.reduce.add.v8i32", I32, code.load(total))
        code.store(together, code.gep(sums, [number]))
    code.ret_void()
    return function


def _write_multiply(module: ir.Module, planes: int, halves: bool) -> Any:
    """``multiply(job)``: the product of blocks of 64 rows that nobody has begun, until there are none.

    A value is the sum over groups, in their order, of ``factor * (scale * dot + zero * sum)`` in float32: only the
    exact ``dot`` depends on how vectors are made use of.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "multiply")
    function.linkage = "internal"
    code = Code(module, function)
    (job,) = function.args
    field = _fields(code, job, planes)
    rows, groups, group, blocks = (field[name] for name in ("rows", "groups", "group", "blocks"))
    places = _Places(code)
    thread = code.atomic_rmw("add", code.gep(job, [code.word(len(field) + 1)]), code.word(1), "monotonic")
    begin, work, end = (function.append_basic_block(name) for name in ("begin", "work", "end"))
    code.branch(begin)
    code.position_at_end(begin)
    block = code.atomic_rmw("add", code.gep(job, [code.word(len(field))]), code.word(1), "monotonic")
    code.cbranch(code.icmp_unsigned("<", block, blocks), work, end)
    code.position_at_end(work)
    tile = code.mul(block, code.mul(code.mul(groups, group), code.word(HALF)))
    tiles = [code.gep(code.pointer(field[name], I8), [tile]) for name in NIBBLES[planes]]
    with code.loop(groups) as number:
        if planes == 1:
            _int4_scales(code, field, block, number, places)
        else:
            _int8_scales(code, field, block, number, places)
        with code.loop(rows) as row:
            which = code.add(code.mul(row, groups), number)
            digits = code.gep(code.pointer(field["input"], I8), [code.mul(code.mul(which, code.word(planes)), group)])
            _dot(code, tiles, code.mul(number, group), digits, group, places)
            factor = code.splat(code.load(code.gep(code.pointer(field["factors"], F32), [which])), LANES)
            total = code.splat(code.load(code.gep(code.pointer(field["sums"], I32), [which])), LANES)
            middle = code.mul(total, code.all_of(INTS, 8 if planes == 1 else 8 * PLANES))
            whole = code.sitofp(total, FLOATS)
            out = _totals(code, field, thread, row)
            for first in range(0, ROWS, LANES):
                dot = code.sitofp(code.sub(code.load(places.dots[first]), middle), FLOATS)
                dot = code.fmul(code.load(places.scales[first]), dot)
                sum_ = code.fmul(factor, code.fadd(dot, code.fmul(code.load(places.zeros[first]), whole)))
                at = code.word(first)
                before = code.read(FLOATS, out, at)
                begun = code.icmp_unsigned("!=", number, code.word(0))
                code.write(code.fadd(code.select(begun, before, code.all_of(FLOATS, 0.0)), sum_), out, at)
    product = code.pointer(field["product"], I16 if halves else F32)
    with code.loop(rows) as row:
        total = _totals(code, field, thread, row)
        own = code.gep(product, [code.mul(code.add(code.mul(row, blocks), block), code.word(ROWS))])
        for first in range(0, ROWS, LANES):
            at = code.word(first)
            code.write_floats(code.read(FLOATS, total, at), own, at)
    code.branch(begin)
    code.position_at_end(end)
    code.ret_void()
    return function


def _fields(code: Code, job: Any, planes: int) -> dict[str, Any]:
    """Those of a job, by name."""
    names = NIBBLES[planes] + SCALES[planes] + OTHERS
    return {name: code.load(code.gep(job, [code.word(number)])) for number, name in enumerate(names)}


def _totals(code: Code, field: dict[str, Any], thread: Any, row: Any) -> Any:
    """Where a thread adds up a row of the input times the block of 64 rows of the matrix that it has begun."""
    at = code.mul(code.add(code.mul(thread, field["rows"]), row), code.word(ROWS))
    return code.gep(code.pointer(field["totals"], F32), [at])


def _dot(code: Code, tiles: Sequence[Any], start: Any, digits: Any, group: Any, places: _Places) -> None:
    """To ``places.dots``: of 64 rows, the sums of codes times rounded input over a group that begins at ``start``.

    Two columns of 32 bytes become pairs of neighbouring bytes of one row, which one instruction multiplies with two
    neighbouring bytes of the input, and adds.
    """
    for place in places.dots.values():
        code.store(code.all_of(INTS, 0), place)
    with code.loop(group, STEP) as column:
        at = code.mul(code.add(start, column), code.word(HALF))
        for plane, tile in enumerate(tiles):
            for line in range(0, STEP * HALF, CACHE_LINE):
                code.prefetch(tile, code.add(at, code.word(AHEAD * HALF + line)))
            # By half of the tile's rows, quarters of 8 of them, and digit: sums of 16 columns in 16 bits.
            sums: dict[tuple[int, int, int], Any] = {}
            for pair in range(0, STEP, 2):
                these, those = (
                    code.read(BYTES, tile, code.add(at, code.word((pair + side) * HALF))) for side in (0, 1)
                )
                inputs = []
                for digit in range(len(tiles)):
                    offset = code.add(code.add(column, code.word(pair)), code.mul(group, code.word(digit)))
                    two = code.read(I16, digits, offset)
                    inputs.append(code.bitcast(code.splat(two, 2 * LANES), BYTES))
                for quarter in (0, 1):
                    codes = code.interleave(these, those, quarter)
                    for half in (0, 1):
                        shifted = code.bitcast(codes, WORDS)
                        if half:
                            shifted = code.lshr(shifted, code.all_of(WORDS, 4))
                        nibbles = code.and_(code.bitcast(shifted, BYTES), code.all_of(BYTES, 15))
                        for digit, two in enumerate(inputs):
                            products = code.call_named("llvm.x86.avx2.pmadd.ub.sw", WORDS, nibbles, two)
                            key = half, quarter, digit
                            sums[key] = code.add(sums[key], products) if key in sums else products
            for (half, quarter, digit), sum_ in sums.items():
                bits = 4 * plane + DIGIT_BITS * (len(tiles) - 1 - digit)
                for upper in (0, 1):
                    place = places.dots[half * HALF + upper * 2 * LANES + quarter * LANES]
                    more = code.shl(code.sext(code.half(sum_, upper), INTS), code.all_of(INTS, bits))
                    code.store(code.add(code.load(place), more), place)


def _int4_scales(code: Code, field: dict[str, Any], block: Any, number: Any, places: _Places) -> None:
    """To ``places``: a bfloat16 is the upper half of a float32, and a pair of them is (scale, zero)."""
    at = code.add(code.mul(number, field["blocks"]), block)
    pairs = code.gep(code.pointer(field["scales"], I32), [code.mul(at, code.word(ROWS))])
    for first in range(0, ROWS, LANES):
        both = code.read(INTS, pairs, code.word(first))
        code.store(code.bitcast(code.shl(both, code.all_of(INTS, 16)), FLOATS), places.scales[first])
        code.store(code.bitcast(code.and_(both, code.all_of(INTS, -0x10000)), FLOATS), places.zeros[first])


def _int8_scales(code: Code, field: dict[str, Any], block: Any, number: Any, places: _Places) -> None:
    """To ``places``: as ``scales_and_zeros`` of the int8 reference, with the zeros of both planes together."""
    at = code.add(code.mul(block, field["groups"]), number)
    pairs = code.gep(code.pointer(field["scales"], I16), [code.mul(at, code.word(ROWS))])
    steps = code.gep(code.pointer(field["steps"], F32), [code.mul(block, code.word(ROWS))])
    for first in range(0, ROWS, LANES):
        both = code.zext(code.read(ir.VectorType(I16, LANES), pairs, code.word(first)), INTS)
        scale = code.uitofp(code.and_(both, code.all_of(INTS, 255)), FLOATS)
        scale = code.to_bfloat16(code.fmul(code.read(FLOATS, steps, code.word(first)), scale))
        zero = code.sub(code.lshr(both, code.all_of(INTS, 8)), code.all_of(INTS, 128))
        zero = code.fmul(code.fmul(scale, code.sitofp(zero, FLOATS)), code.all_of(FLOATS, ZERO_STEP))
        zero = code.to_bfloat16(code.fdiv(zero, code.all_of(FLOATS, PLANES)))
        code.store(scale, places.scales[first])
        code.store(code.fmul(zero, code.all_of(FLOATS, PLANES)), places.zeros[first])


class _Places:
    """Vectors of 8 rows of the 64 each, by the first of these."""

    def __init__(self, code: Code) -> None:
        self.dots = {first: code.alloca(INTS) for first in range(0, ROWS, LANES)}
        self.scales = {first: code.alloca(FLOATS) for first in range(0, ROWS, LANES)}
        self.zeros = {first: code.alloca(FLOATS) for first in range(0, ROWS, LANES)}
