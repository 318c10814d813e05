"""Attention over packed pages, whose codes become numbers in registers: code for LLVM.

See ``kernels/kv_pages/reference.py`` for what stands in a page. Scales of whole tokens are multiplied with scores and
weights; scales of channels with the queries, and their zeros are one number a query and page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from tierstore.kernels.kv_pages.layout import BY_TOKEN, CODE_BITS, layout_of
from tierstore.kernels.paged_attention.vector import Attention, parts
from tierstore.kernels.vector_code import F32, FLOATS, I8, I16, I32, INTS, LANES

AT_ONCE = 6
"""Sums that are in registers together, of some queries and of the codes in a byte."""

BLOCK = 32
"""Dimensions of the values that are summed at once, of one query."""


class PackedAttention(Attention):
    """Over pages of ``page_tokens`` tokens in ``kv_format``, one of ``CODE_BITS``."""

    def __init__(
        self,
        kv_format: str,
        heads: int,
        group: int,
        key_dim: int,
        value_dim: int,
        *,
        page_tokens: int,
        capped: bool = False,
    ) -> None:
        super().__init__(heads, group, key_dim, value_dim, page_tokens=page_tokens, capped=capped)
        self._layout = layout_of(kv_format, heads, page_tokens, key_dim, value_dim)
        self._bits, self._by_token = CODE_BITS[kv_format], kv_format in BY_TOKEN
        self._float = {"fp8": 120, "fp4": 126}.get(kv_format)  # bits are read as float32 with exponents so much lower
        self._fold = 8 // self._bits

    @property
    def thread_floats(self) -> int:
        """Behind the scores, of all queries the weights of tokens, and then the queries times scales."""
        return self.group * (2 * self.score_floats + self.key_dim)

    def page(self, queries: Any, keys: Any, values: Any, head: Any, low: Any, count: Any) -> None:
        code, layout, tokens = self.code, self._layout, self.code.word(self.page_tokens)
        keys, values = (code.pointer(address, I8) for address in (keys, values))
        rows = self.page_tokens // self._fold
        key_codes = self._part(keys, layout.key_codes, head, rows * self.key_dim)
        value_codes = self._part(values, layout.value_codes, head, rows * self.value_dim)
        if self._by_token:
            scales = self._part(keys, layout.key_scales, head, 2 * self.page_tokens, I16)
            self._score(queries, key_codes, value_codes)
        else:
            scales = self._part(keys, layout.key_scales, head, 4 * self.key_dim, I16)
            first = self._part(keys, layout.key_first, head, 2 * self.key_dim, I16)
            begin = self._scale_queries(queries, scales)
            self._score(self._scaled(0), key_codes, value_codes)
        shares = []
        for query in range(self.group):
            scores = self.scores_of(query)
            with code.loop(tokens, LANES) as token:
                each = code.read(FLOATS, scores, token)
                if self._by_token:
                    each = code.fmul(each, code.read_floats(scales, token))
                else:
                    each = code.fadd(each, code.splat(begin[query], LANES))
                code.write(each, scores, token)
            if not self._by_token:
                code.store(self._product(queries, first, query), scores)
            self.cap(query, tokens)
            with code.loop(tokens, LANES) as token:
                seen = self._seen(token, low, count)
                each = code.select(seen, code.read(FLOATS, scores, token), code.all_of(FLOATS, float("-inf")))
                code.write(each, scores, token)
            shares.append(self.weigh(query, tokens))
        self._sum(values, value_codes, head, low, count, shares)

    # ---- keys

    def _scale_queries(self, queries: Any, scales: Any) -> list[Any]:
        """Queries times the scales of channels, to ``_scaled``; of each query the sum of what zeros give."""
        code, found = self.code, []
        zeros = code.gep(scales, [code.word(self.key_dim)])
        for query in range(self.group):
            total = code.alloca_once(FLOATS)
            code.store(code.all_of(FLOATS, 0.0), total)
            asked = code.gep(queries, [code.word(query * self.key_dim)])
            with code.loop(code.word(self.key_dim), LANES) as at:
                each = code.read(FLOATS, asked, at)
                code.write(code.fmul(each, code.read_floats(scales, at)), self._scaled(query), at)
                code.store(self.fused(each, code.read_floats(zeros, at), code.load(total)), total)
            found.append(code.reduced([code.load(total)]))
        return found

    def _scaled(self, query: int) -> Any:
        return self.scratch(2 * self.group * self.score_floats + query * self.key_dim)

    def _score(self, queries: Any, keys: Any, values: Any) -> None:
        """Products of queries and codes, of all tokens of the page. Codes of values are asked for meanwhile."""
        code, height = self.code, self.page_tokens // self._fold
        with code.loop(code.word(height)) as row:
            own = code.gep(keys, [code.mul(row, code.word(self.key_dim))])
            self.ask_for(code.gep(values, [code.mul(row, code.word(self.value_dim))]), self.value_dim)
            for some in parts(range(self.group), max(1, AT_ONCE // self._fold)):
                sums: dict[tuple[int, int, int], Any] = {}
                apart = max(1, 4 // (len(some) * self._fold))  # additions that do not wait for each other
                for number, at in enumerate(range(0, self.key_dim, LANES)):
                    for piece, key in enumerate(self._numbers(own, code.word(at))):
                        for query in some:
                            asked = code.read(FLOATS, queries, code.word(query * self.key_dim + at))
                            name = (query, piece, number % apart)
                            sums[name] = self.fused(asked, key, sums[name]) if name in sums else code.fmul(asked, key)
                for query in some:
                    for piece in range(self._fold):
                        score = code.reduced([sums[name] for name in sums if name[:2] == (query, piece)])
                        code.store(score, self._of_token(self.scores_of(query), row, piece))

    def _product(self, queries: Any, first: Any, query: int) -> Any:
        """The score of the token that is kept as it is."""
        code, total = self.code, self.code.alloca_once(FLOATS)
        code.store(code.all_of(FLOATS, 0.0), total)
        asked = code.gep(queries, [code.word(query * self.key_dim)])
        with code.loop(code.word(self.key_dim), LANES) as at:
            sums = self.fused(code.read(FLOATS, asked, at), code.read_floats(first, at), code.load(total))
            code.store(sums, total)
        return code.reduced([code.load(total)])

    # ---- values

    def _sum(self, values: Any, codes: Any, head: Any, low: Any, count: Any, shares: Sequence[Any]) -> None:
        """Add the values, each times its exponential, to what earlier sums are worth."""
        code, layout = self.code, self._layout
        scales = self._part(values, layout.value_scales, head, (2 if self._by_token else 4) * self.page_tokens, I16)
        first = self._part(values, layout.value_first, head, 2 * self.value_dim, I16)
        added = [self._weights(query, scales, low, count) for query in range(self.group)]
        for dims in parts(range(0, self.value_dim, LANES), BLOCK // LANES):
            for query in range(self.group):
                sums = {at: code.alloca_once(FLOATS) for at in dims}
                for at, place in sums.items():
                    before = code.fmul(code.read(FLOATS, self.out_of(query), code.word(at)), shares[query])
                    if not self._by_token:
                        zeros, kept = added[query]
                        before = self.fused(kept, code.read_floats(first, code.word(at)), code.fadd(before, zeros))
                    code.store(before, place)
                with code.loop(code.word(self.page_tokens // self._fold)) as row:
                    own = code.gep(codes, [code.mul(row, code.word(self.value_dim))])
                    weights = [self._weight(query, row, piece) for piece in range(self._fold)]
                    for at, place in sums.items():
                        total = code.load(place)
                        for weight, value in zip(weights, self._numbers(own, code.word(at)), strict=True):
                            total = self.fused(weight, value, total)
                        code.store(total, place)
                for at, place in sums.items():
                    code.write(code.load(place), self.out_of(query), code.word(at))

    def _weights(self, query: int, scales: Any, low: Any, count: Any) -> tuple[Any, Any]:
        """Exponentials times the scales of their tokens, 0 for tokens that are not seen; as vectors the sum of what
        zeros give, and the exponential of the token that is kept as it is."""
        code, scores, weights = self.code, self.scores_of(query), self._weights_of(query)
        nothing = code.all_of(FLOATS, 0.0)
        zeros = code.gep(scales, [code.word(self.page_tokens)])
        total = code.alloca_once(FLOATS)
        code.store(nothing, total)
        with code.loop(code.word(self.page_tokens), LANES) as token:
            seen = self._seen(token, low, count)
            if not self._by_token:
                seen = code.and_(seen, self._behind_first(token))
            each = code.read(FLOATS, scores, token)
            code.write(code.select(seen, code.fmul(each, code.read_floats(scales, token)), nothing), weights, token)
            if not self._by_token:
                each = code.select(seen, code.fmul(each, code.read_floats(zeros, token)), nothing)
                code.store(code.fadd(code.load(total), each), total)
        kept = code.select(code.icmp_signed("==", low, code.word(0)), code.load(scores), ir.Constant(F32, 0.0))
        return code.splat(code.reduced([code.load(total)]), LANES), code.splat(kept, LANES)

    def _weights_of(self, query: int) -> Any:
        return self.scratch((self.group + query) * self.score_floats)

    def _weight(self, query: int, row: Any, piece: int) -> Any:
        return self.code.splat(self.code.load(self._of_token(self._weights_of(query), row, piece)), LANES)

    # ---- both

    def _part(self, cell: Any, offset: int, head: Any, nbytes: int, what: Any = I8) -> Any:
        """A pointer to what a head has of a part of the cell, ``nbytes`` for each head."""
        code = self.code
        start = code.add(code.word(offset), code.mul(head, code.word(nbytes)))
        return code.bitcast(code.gep(cell, [start]), what.as_pointer())

    def _of_token(self, floats: Any, row: Any, piece: int) -> Any:
        """Of codes in one byte, each is that of a token so many rows on."""
        code = self.code
        return code.gep(floats, [code.add(row, code.word(piece * (self.page_tokens // self._fold)))])

    def _seen(self, token: Any, low: Any, count: Any) -> Any:
        """Which of 8 tokens from ``token`` on a query sees."""
        code = self.code
        places = code.add(code.splat(code.trunc(code.sub(token, low), I32), LANES), _counted(INTS))
        return code.icmp_unsigned("<", places, code.splat(code.trunc(count, I32), LANES))

    def _behind_first(self, token: Any) -> Any:
        code = self.code
        places = code.add(code.splat(code.trunc(token, I32), LANES), _counted(INTS))
        return code.icmp_unsigned("!=", places, code.all_of(INTS, 0))

    def _numbers(self, codes: Any, at: Any) -> list[Any]:
        """8 dimensions of the tokens that share bytes: their codes as numbers, still without scales."""
        code = self.code
        loaded = code.read(ir.VectorType(I8, LANES), codes, at)
        if self._bits == 8 and self._float is None:
            return [code.sitofp(code.sext(loaded, INTS), FLOATS)]
        wide, found = code.zext(loaded, INTS), []
        for piece in range(self._fold):
            bits = code.lshr(wide, code.all_of(INTS, piece * self._bits)) if piece else wide
            if self._float is None:
                number = code.sitofp(code.and_(bits, code.all_of(INTS, (1 << self._bits) - 1)), FLOATS)
            else:
                number = self._small_float(bits)
            found.append(number)
        return found

    def _small_float(self, bits: Any) -> Any:
        """e4m3 or e2m1: the bits where float32 has them, and then its exponents."""
        code, sign = self.code, self._bits - 1
        mantissa = {8: 3, 4: 1}[self._bits]
        size = code.and_(bits, code.all_of(INTS, (1 << sign) - 1))
        minus = code.shl(code.and_(bits, code.all_of(INTS, 1 << sign)), code.all_of(INTS, 31 - sign))
        whole = code.or_(code.shl(size, code.all_of(INTS, 23 - mantissa)), minus)
        return code.fmul(code.bitcast(whole, FLOATS), code.all_of(FLOATS, 2.0 ** (self._float or 0)))


def _counted(vector: Any) -> Any:
    return ir.Constant(vector, list(range(vector.count)))
