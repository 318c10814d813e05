"""The code of attention over pages that are not packed, one query a row, written for LLVM: vectors of 8 float32.

Keys and values are read where they lie, once: a task is a head of the keys, in some pages of a row. Scores of a page
wait in a cache until their softmax is known, and what was summed before is weighted anew (online softmax, Milakov and
Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import factorial, log
from typing import Any

from llvmlite import ir

from tierstore.kernels.vector_code import F32, FLOATS, I8, I16, I32, I64, INTS, LANES, Code, write_carry_out

FIELDS = (
    *("queries", "buffer", "keys", "values", "spans", "out", "most", "total", "scores", "cap"),
    *("rows", "pieces", "splits", "split_pieces", "piece_tokens"),
)
"""Of a job, 64 bits each: addresses, the softcap as the bits of a float32, then counts. Behind them are the number of
the first task that nobody has begun, and that of the threads that have begun.

``queries`` float32 [rows, heads, group, key_dim], scaled; ``buffer`` bytes, in which pieces [piece_tokens, heads, dim]
begin at bytes ``keys`` and ``values``, int64 [rows, pieces]; ``spans`` int32 [rows, 2]. To ``out`` float32 [splits,
rows, heads, group, value_dim] comes the sum of values, each times the exponential of its score less ``most``; to
``total`` the sum of these exponentials, both float32 [splits, rows, heads, group]. ``scores`` is memory to work with,
float32 [threads, group, piece_tokens up to 8 more]."""

NARROWEST = -3.0e38
"""Below every score."""

KEY_QUERIES, VALUE_QUERIES = 6, 2
"""Queries that are multiplied with keys, or values, while these are in registers."""

BLOCK = 32
"""Dimensions of the values that are summed at once: a cache line of bfloat16."""

AHEAD = 32
"""Tokens that are asked for before they are needed."""

CACHE_LINE = 64


@dataclass(frozen=True)
class Shape:
    """What code is written for: ``element`` is "bfloat16", "float16" or "float32", ``group`` the queries that read one
    head of the keys. ``capped``: scores have a softcap."""

    element: str
    heads: int
    group: int
    key_dim: int
    value_dim: int
    capped: bool

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 4 if self.element == "float32" else 2


def write(shape: Shape) -> ir.Module:
    """A module of ``carry_out``."""
    module = ir.Module("paged_attention")
    write_carry_out(module, None, _Attend(module, shape).function)
    return module


class _Attend:
    """Writes ``attend(job)``: the tasks that nobody has begun, until there are none."""

    def __init__(self, module: ir.Module, shape: Shape) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "attend")
        self.function.linkage = "internal"
        self._shape = shape
        self._code = code = Code(module, self.function)
        (job,) = self.function.args
        self._field = {name: code.load(code.gep(job, [code.word(at)])) for at, name in enumerate(FIELDS)}
        field, word = self._field, code.word
        self._room = code.and_(code.add(field["piece_tokens"], word(2 * LANES - 1)), word(-LANES))
        heads = word(shape.heads)
        thread = code.atomic_rmw("add", code.gep(job, [word(len(FIELDS) + 1)]), word(1), "monotonic")
        scores = code.mul(thread, code.mul(word(shape.group), self._room))
        self._scores = code.gep(code.pointer(field["scores"], F32), [scores])
        tasks = code.mul(code.mul(field["splits"], field["rows"]), heads)
        begin, work, end = (self.function.append_basic_block(name) for name in ("begin", "work", "end"))
        code.branch(begin)
        code.position_at_end(begin)
        task = code.atomic_rmw("add", code.gep(job, [word(len(FIELDS))]), word(1), "monotonic")
        code.cbranch(code.icmp_unsigned("<", task, tasks), work, end)
        code.position_at_end(work)
        self._task(task)
        code.branch(begin)
        code.position_at_end(end)
        code.ret_void()

    def _task(self, task: Any) -> None:
        """A head of a row, in the pieces of a split. Neighbouring tasks are heads of the same pages."""
        code, shape, field, word = self._code, self._shape, self._field, self._code.word
        head, rest = code.urem(task, word(shape.heads)), code.udiv(task, word(shape.heads))
        row, split = code.urem(rest, field["rows"]), code.udiv(rest, field["rows"])
        own = code.mul(task, word(shape.group))  # tasks are in the order of splits, rows and heads
        out = code.gep(code.pointer(field["out"], F32), [code.mul(own, word(shape.value_dim))])
        most, total = (code.gep(code.pointer(field[name], F32), [own]) for name in ("most", "total"))
        with code.loop(word(shape.group * shape.value_dim), LANES) as at:
            code.write(code.all_of(FLOATS, 0.0), out, at)
        for query in range(shape.group):
            code.store(ir.Constant(F32, NARROWEST), code.gep(most, [word(query)]))
            code.store(ir.Constant(F32, 0.0), code.gep(total, [word(query)]))
        queries = code.mul(code.add(code.mul(row, word(shape.heads)), head), word(shape.group * shape.key_dim))
        queries = code.gep(code.pointer(field["queries"], F32), [queries])
        start, stop = (
            code.sext(code.load(code.gep(code.pointer(field["spans"], I32), [place])), I64)
            for place in (code.mul(row, word(2)), code.add(code.mul(row, word(2)), word(1)))
        )
        first = code.mul(split, field["split_pieces"])
        with code.loop(field["split_pieces"]) as number:
            piece = code.add(first, number)
            begins = code.mul(piece, field["piece_tokens"])
            low = self._between(code.sub(start, begins))
            count = code.sub(self._between(code.sub(stop, begins)), low)
            there = code.and_(code.icmp_unsigned("<", piece, field["pieces"]), code.icmp_signed(">", count, word(0)))
            with code.if_then(there):
                place = code.add(code.mul(row, field["pieces"]), piece)
                keys, values = (
                    self._piece(field[name], place, low, head, dim)
                    for name, dim in (("keys", shape.key_dim), ("values", shape.value_dim))
                )
                self._score(queries, keys, values, count)
                shares = [self._weigh(query, count, most, total) for query in range(shape.group)]
                self._sum(values, count, out, shares)

    def _between(self, tokens: Any) -> Any:
        """The number, or the nearest that a piece has."""
        code, most = self._code, self._field["piece_tokens"]
        tokens = code.select(code.icmp_signed("<", tokens, code.word(0)), code.word(0), tokens)
        return code.select(code.icmp_signed(">", tokens, most), most, tokens)

    def _piece(self, offsets: Any, place: Any, token: Any, head: Any, dim: int) -> Any:
        """A pointer to a token's ``head`` in a piece."""
        code, shape = self._code, self._shape
        at = code.load(code.gep(code.pointer(offsets, I64), [place]))
        element = code.mul(code.add(code.mul(token, code.word(shape.heads)), head), code.word(dim))
        byte = code.add(code.add(self._field["buffer"], at), code.mul(element, code.word(shape.itemsize)))
        return code.pointer(byte, {"bfloat16": I16, "float16": ir.HalfType(), "float32": F32}[shape.element])

    def _token(self, states: Any, token: Any, dim: int) -> Any:
        """A pointer to the head of a token."""
        return self._code.gep(states, [self._code.mul(token, self._code.word(self._shape.heads * dim))])

    def _ask_for(self, states: Any, token: Any, dim: int) -> None:
        """Let the head of a token come into the caches."""
        code = self._code
        own = code.bitcast(self._token(states, token, dim), I8.as_pointer())
        for line in range(0, dim * self._shape.itemsize, CACHE_LINE):
            code.prefetch(own, code.word(line))

    def _score(self, queries: Any, keys: Any, values: Any, count: Any) -> None:
        """The scores of ``count`` tokens, and behind them those of none. Their values are asked for meanwhile."""
        code, shape = self._code, self._shape
        with code.loop(count) as token:
            self._ask_for(keys, code.add(token, code.word(AHEAD)), shape.key_dim)
            self._ask_for(values, token, shape.value_dim)
            own = self._token(keys, token, shape.key_dim)
            for some in _in_parts(shape.group, KEY_QUERIES):
                sums: dict[tuple[int, int], Any] = {}
                apart = max(1, 4 // len(some))  # additions that do not wait for each other
                for number, at in enumerate(range(0, shape.key_dim, LANES)):
                    key = code.read_floats(own, code.word(at))
                    for query in some:
                        asked = code.read(FLOATS, queries, code.word(query * shape.key_dim + at))
                        name = (query, number % apart)
                        sums[name] = self._fused(asked, key, sums[name]) if name in sums else code.fmul(asked, key)
                for query in some:
                    score = code.reduced([each for (whose, _), each in sums.items() if whose == query])
                    code.store(score, code.gep(self._scores_of(query), [token]))
        for query in range(shape.group):
            scores = self._scores_of(query)
            if shape.capped:
                with code.loop(count, LANES) as token:
                    code.write(self._capped(code.read(FLOATS, scores, token)), scores, token)
            code.write(code.all_of(FLOATS, float("-inf")), scores, count)

    def _weigh(self, query: int, count: Any, most: Any, total: Any) -> Any:
        """Make the scores of a query exponentials, less the greatest score until now; what earlier sums are worth."""
        code, scores = self._code, self._scores_of(query)
        most, total = (code.gep(each, [code.word(query)]) for each in (most, total))
        before = code.load(most)
        place = code.alloca_once(FLOATS)
        code.store(code.splat(before, LANES), place)
        with code.loop(count, LANES) as token:
            each = code.read(FLOATS, scores, token)
            code.store(code.intrinsic("llvm.maximum", FLOATS, code.load(place), each), place)
        after = code.call_named("llvm.vector.reduce.fmaximum.v8f32", F32, code.load(place))
        code.store(after, most)
        code.store(code.all_of(FLOATS, 0.0), place)
        lowered = code.splat(after, LANES)
        with code.loop(count, LANES) as token:
            each = self._exponential(code.fsub(code.read(FLOATS, scores, token), lowered))
            code.write(each, scores, token)
            code.store(code.fadd(code.load(place), each), place)
        share = self._exponential(code.splat(code.fsub(before, after), LANES))
        one = code.extract_element(share, ir.Constant(I32, 0))
        code.store(code.fadd(code.fmul(code.load(total), one), code.reduced([code.load(place)])), total)
        return share

    def _sum(self, values: Any, count: Any, out: Any, shares: Sequence[Any]) -> None:
        """Add the values, each times its exponential, to what earlier sums are worth."""
        code, shape = self._code, self._shape
        for first in range(0, shape.value_dim, BLOCK):
            dims = range(first, min(first + BLOCK, shape.value_dim), LANES)
            for some in _in_parts(shape.group, VALUE_QUERIES):
                places = {(query, at): code.word(query * shape.value_dim + at) for query in some for at in dims}
                sums = {name: code.alloca_once(FLOATS) for name in places}
                for (query, at), place in places.items():
                    code.store(code.fmul(code.read(FLOATS, out, place), shares[query]), sums[query, at])
                with code.loop(count) as token:
                    weights = {q: code.load(code.gep(self._scores_of(q), [token])) for q in some}
                    weights = {q: code.splat(weight, LANES) for q, weight in weights.items()}
                    own = self._token(values, token, shape.value_dim)
                    for at in dims:
                        value = code.read_floats(own, code.word(at))
                        for query in some:
                            place = sums[query, at]
                            code.store(self._fused(weights[query], value, code.load(place)), place)
                for name, place in places.items():
                    code.write(code.load(sums[name]), out, place)

    def _scores_of(self, query: int) -> Any:
        code = self._code
        return code.gep(self._scores, [code.mul(code.word(query), self._room)])

    def _fused(self, these: Any, those: Any, sums: Any) -> Any:
        return self._code.intrinsic("llvm.fma", FLOATS, these, those, sums)

    def _exponential(self, values: Any) -> Any:
        """e to the power of ``values``, which are 0 or less, or not numbers: a power of two, times a polynomial in what
        is left, from -1/2 to 1/2. Relative error below 2e-7, and at least 2 ** -126."""
        code = self._code
        powers = code.fmul(values, code.all_of(FLOATS, 1 / log(2)))
        powers = code.intrinsic("llvm.maximum", FLOATS, powers, code.all_of(FLOATS, -126.0))
        whole = code.intrinsic("llvm.roundeven", FLOATS, powers)
        left = code.fsub(powers, whole)
        terms = [log(2) ** n / factorial(n) for n in range(8)]
        found = code.all_of(FLOATS, terms[-1])
        for term in reversed(terms[:-1]):
            found = self._fused(found, left, code.all_of(FLOATS, term))
        number = code.call_named(f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", INTS, whole)
        bits = code.shl(code.add(number, code.all_of(INTS, 127)), code.all_of(INTS, 23))
        return code.fmul(found, code.bitcast(bits, FLOATS))

    def _capped(self, values: Any) -> Any:
        """``cap * tanh(values)``."""
        code = self._code
        cap = code.bitcast(code.trunc(self._field["cap"], I32), F32)
        size = code.intrinsic("llvm.fabs", FLOATS, values)
        small = self._exponential(code.fmul(size, code.all_of(FLOATS, -2.0)))
        ones = code.all_of(FLOATS, 1.0)
        tanh = code.fdiv(code.fsub(ones, small), code.fadd(ones, small))
        tanh = code.intrinsic("llvm.copysign", FLOATS, tanh, values)
        return code.fmul(tanh, code.splat(cap, LANES))


def _in_parts(count: int, most: int) -> Iterable[range]:
    return (range(start, min(start + most, count)) for start in range(0, count, most))
