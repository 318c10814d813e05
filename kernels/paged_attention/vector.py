"""The code of attention over pages, one query a row, written for LLVM: vectors of 8 float32.

Keys and values are read where they lie, once: a task is a head of the keys, in some pages of a row. Scores of a page
wait in a cache until their softmax is known, and what was summed before is weighted anew (online softmax, Milakov and
Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import factorial, log
from typing import Any

from llvmlite import ir

from tierstore.kernels.vector_code import F32, FLOATS, I8, I32, I64, INTS, LANES, Code, write_carry_out

FIELDS = (
    *("queries", "buffer", "keys", "values", "spans", "out", "most", "total", "scratch", "cap"),
    *("rows", "pages", "splits", "split_pages"),
)
"""Of a job, 64 bits each: addresses, the softcap as the bits of a float32, then counts. Behind them are the number of
the first task that nobody has begun, and that of the threads that have begun.

``queries`` float32 [rows, heads, group, key_dim], scaled; ``buffer`` bytes, in which pages have
their keys at bytes ``keys`` and their values at ``values``, int64 [rows, pages]; ``spans`` int32 [rows, 2]. To
``out`` float32 [splits, rows, heads, group, value_dim] comes the sum of values, each times the exponential of its score
less ``most``; to ``total`` the sum of these exponentials, both float32 [splits, rows, heads, group]. ``scratch`` is
memory to work with, ``thread_floats`` of float32 for each thread."""

NARROWEST = -3.0e38
"""Below every score."""

CACHE_LINE = 64


class Attention(ABC):
    """Writes ``attend(job)``: the tasks that nobody has begun, until there are none. Of the keys there are ``heads``,
    each of which ``group`` queries read; a page has ``page_tokens``. ``capped``: scores have a softcap."""

    def __init__(self, heads: int, group: int, key_dim: int, value_dim: int, *, page_tokens: int, capped: bool) -> None:
        self.heads, self.group, self.key_dim, self.value_dim = heads, group, key_dim, value_dim
        self.page_tokens, self._capped = page_tokens, capped

    @property
    def score_floats(self) -> int:
        """For the scores of a query in a page, and for what is read behind them."""
        return (self.page_tokens + 2 * LANES - 1) // LANES * LANES

    @property
    def thread_floats(self) -> int:
        """Of memory that a thread works with: scores of all queries first."""
        return self.group * self.score_floats

    def write(self) -> ir.Module:
        """A module of ``carry_out``."""
        module = ir.Module("paged_attention")
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "attend")
        function.linkage = "internal"
        self.code = code = Code(module, function)
        (job,) = function.args
        self.field = field = {name: code.load(code.gep(job, [code.word(at)])) for at, name in enumerate(FIELDS)}
        word = code.word
        thread = code.atomic_rmw("add", code.gep(job, [word(len(FIELDS) + 1)]), word(1), "monotonic")
        self._scratch = code.gep(code.pointer(field["scratch"], F32), [code.mul(thread, word(self.thread_floats))])
        tasks = code.mul(code.mul(field["splits"], field["rows"]), word(self.heads))
        begin, work, end = (function.append_basic_block(name) for name in ("begin", "work", "end"))
        code.branch(begin)
        code.position_at_end(begin)
        task = code.atomic_rmw("add", code.gep(job, [word(len(FIELDS))]), word(1), "monotonic")
        code.cbranch(code.icmp_unsigned("<", task, tasks), work, end)
        code.position_at_end(work)
        self._task(task)
        code.branch(begin)
        code.position_at_end(end)
        code.ret_void()
        write_carry_out(module, None, function)
        return module

    @abstractmethod
    def page(self, queries: Any, keys: Any, values: Any, head: Any, low: Any, count: Any) -> None:
        """Attention over ``count`` tokens from ``low`` on of a page whose keys and values are at these addresses: the
        scores, ``weigh`` for each query, and the sum of values to ``out_of``."""

    def scratch(self, at: int) -> Any:
        """What the thread works with, from float ``at`` on."""
        return self.code.gep(self._scratch, [self.code.word(at)])

    def scores_of(self, query: int) -> Any:
        """Where the scores of a query are."""
        return self.scratch(query * self.score_floats)

    def out_of(self, query: int) -> Any:
        """Where the values of a query are summed."""
        return self.code.gep(self._out, [self.code.word(query * self.value_dim)])

    def fused(self, these: Any, those: Any, sums: Any) -> Any:
        """``these * those + sums``, rounded once."""
        return self.code.intrinsic("llvm.fma", FLOATS, these, those, sums)

    def ask_for(self, pointer: Any, nbytes: int) -> None:
        """Let bytes come into the caches."""
        pointer = self.code.bitcast(pointer, I8.as_pointer())
        for line in range(0, nbytes, CACHE_LINE):
            self.code.prefetch(pointer, self.code.word(line))

    def cap(self, query: int, count: Any) -> None:
        """The softcap of ``count`` scores, if there is one."""
        code, scores = self.code, self.scores_of(query)
        if self._capped:
            with code.loop(count, LANES) as token:
                code.write(self._cap(code.read(FLOATS, scores, token)), scores, token)

    def weigh(self, query: int, count: Any) -> Any:
        """Make ``count`` scores exponentials, less the greatest score until now; what earlier sums are worth. Behind
        them, up to a whole vector, scores are -inf."""
        code, scores = self.code, self.scores_of(query)
        most, total = (code.gep(each, [code.word(query)]) for each in (self._most, self._total))
        before = code.load(most)
        place = code.alloca_once(FLOATS)
        code.store(code.splat(before, LANES), place)
        with code.loop(count, LANES) as token:
            greater = code.intrinsic("llvm.maximum", FLOATS, code.load(place), code.read(FLOATS, scores, token))
            code.store(greater, place)
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

    def _task(self, task: Any) -> None:
        """A head of a row, in the pages of a split. Neighbouring tasks are heads of the same pages."""
        code, field, word = self.code, self.field, self.code.word
        head, rest = code.urem(task, word(self.heads)), code.udiv(task, word(self.heads))
        row, split = code.urem(rest, field["rows"]), code.udiv(rest, field["rows"])
        own = code.mul(task, word(self.group))  # tasks are in the order of splits, rows and heads
        self._out = code.gep(code.pointer(field["out"], F32), [code.mul(own, word(self.value_dim))])
        self._most, self._total = (code.gep(code.pointer(field[name], F32), [own]) for name in ("most", "total"))
        with code.loop(word(self.group * self.value_dim), LANES) as at:
            code.write(code.all_of(FLOATS, 0.0), self._out, at)
        for query in range(self.group):
            code.store(ir.Constant(F32, NARROWEST), code.gep(self._most, [word(query)]))
            code.store(ir.Constant(F32, 0.0), code.gep(self._total, [word(query)]))
        queries = code.mul(code.add(code.mul(row, word(self.heads)), head), word(self.group * self.key_dim))
        queries = code.gep(code.pointer(field["queries"], F32), [queries])
        start, stop = (
            code.sext(code.load(code.gep(code.pointer(field["spans"], I32), [place])), I64)
            for place in (code.mul(row, word(2)), code.add(code.mul(row, word(2)), word(1)))
        )
        first = code.mul(split, field["split_pages"])
        with code.loop(field["split_pages"]) as number:
            page = code.add(first, number)
            begins = code.mul(page, word(self.page_tokens))
            low = self._between(code.sub(start, begins))
            count = code.sub(self._between(code.sub(stop, begins)), low)
            there = code.and_(code.icmp_unsigned("<", page, field["pages"]), code.icmp_signed(">", count, word(0)))
            with code.if_then(there):
                place = code.add(code.mul(row, field["pages"]), page)
                keys, values = (
                    code.add(field["buffer"], code.load(code.gep(code.pointer(field[name], I64), [place])))
                    for name in ("keys", "values")
                )
                self.page(queries, keys, values, head, low, count)

    def _between(self, tokens: Any) -> Any:
        """The number, or the nearest that a page has."""
        code, most = self.code, self.code.word(self.page_tokens)
        tokens = code.select(code.icmp_signed("<", tokens, code.word(0)), code.word(0), tokens)
        return code.select(code.icmp_signed(">", tokens, most), most, tokens)

    def _exponential(self, values: Any) -> Any:
        """e to the power of ``values``, which are 0 or less, or not numbers: a power of two, times a polynomial in what
        is left, from -1/2 to 1/2. Relative error below 2e-7, and at least 2 ** -126."""
        code = self.code
        powers = code.fmul(values, code.all_of(FLOATS, 1 / log(2)))
        powers = code.intrinsic("llvm.maximum", FLOATS, powers, code.all_of(FLOATS, -126.0))
        whole = code.intrinsic("llvm.roundeven", FLOATS, powers)
        left = code.fsub(powers, whole)
        terms = [log(2) ** n / factorial(n) for n in range(8)]
        found = code.all_of(FLOATS, terms[-1])
        for term in reversed(terms[:-1]):
            found = self.fused(found, left, code.all_of(FLOATS, term))
        number = code.call_named(f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", INTS, whole)
        bits = code.shl(code.add(number, code.all_of(INTS, 127)), code.all_of(INTS, 23))
        return code.fmul(found, code.bitcast(bits, FLOATS))

    def _cap(self, values: Any) -> Any:
        """``cap * tanh(values)``."""
        code = self.code
        cap = code.bitcast(code.trunc(self.field["cap"], I32), F32)
        size = code.intrinsic("llvm.fabs", FLOATS, values)
        small = self._exponential(code.fmul(size, code.all_of(FLOATS, -2.0)))
        ones = code.all_of(FLOATS, 1.0)
        tanh = code.fdiv(code.fsub(ones, small), code.fadd(ones, small))
        tanh = code.intrinsic("llvm.copysign", FLOATS, tanh, values)
        return code.fmul(tanh, code.splat(cap, LANES))


def parts(numbers: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Some of them at a time."""
    return (numbers[start : start + most] for start in range(0, len(numbers), most))
