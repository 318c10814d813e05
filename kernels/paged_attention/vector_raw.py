"""Attention over pages that are not packed, token by token, all heads of a token side by side: code for LLVM."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tierstore.kernels.paged_attention.vector import Attention, parts
from tierstore.kernels.vector_code import F32, FLOATS, I16, LANES

ELEMENTS = {"bfloat16": (I16, 2), "float16": (ir.HalfType(), 2), "float32": (F32, 4)}
"""As what they are read, and their bytes."""

KEY_QUERIES, VALUE_QUERIES = 6, 2
"""Queries that are multiplied with keys, or values, while these are in registers."""

BLOCK = 32
"""Dimensions of the values that are summed at once: a cache line of bfloat16."""

AHEAD = 16
"""Tokens whose keys are asked for before they are needed."""


class RawAttention(Attention):
    """Over pages of ``element``: "bfloat16", "float16" or "float32"."""

    def __init__(
        self,
        element: str,
        heads: int,
        group: int,
        key_dim: int,
        value_dim: int,
        *,
        page_tokens: int,
        capped: bool = False,
    ) -> None:
        super().__init__(heads, group, key_dim, value_dim, page_tokens=page_tokens, capped=capped)
        self._element, self._itemsize = ELEMENTS[element]

    def page(self, queries: Any, keys: Any, values: Any, head: Any, low: Any, count: Any) -> None:
        keys, values = (
            self._token(self.code.pointer(self._head(at, head, dim), self._element), low, dim)
            for at, dim in ((keys, self.key_dim), (values, self.value_dim))
        )
        self._score(queries, keys, values, count)
        shares = []
        for query in range(self.group):
            self.cap(query, count)
            self.code.write(self.code.all_of(FLOATS, float("-inf")), self.scores_of(query), count)
            shares.append(self.weigh(query, count))
        self._sum(values, count, shares)

    def _head(self, address: Any, head: Any, dim: int) -> Any:
        return self.code.add(address, self.code.mul(head, self.code.word(dim * self._itemsize)))

    def _token(self, states: Any, token: Any, dim: int) -> Any:
        """A pointer to the head of a token."""
        return self.code.gep(states, [self.code.mul(token, self.code.word(self.heads * dim))])

    def _score(self, queries: Any, keys: Any, values: Any, count: Any) -> None:
        """The scores of ``count`` tokens. Their values are asked for meanwhile."""
        code = self.code
        with code.loop(count) as token:
            ahead = code.add(token, code.word(AHEAD))
            self.ask_for(self._token(keys, ahead, self.key_dim), self.key_dim * self._itemsize)
            self.ask_for(self._token(values, token, self.value_dim), self.value_dim * self._itemsize)
            own = self._token(keys, token, self.key_dim)
            for some in parts(range(self.group), KEY_QUERIES):
                sums: dict[tuple[int, int], Any] = {}
                apart = max(1, 4 // len(some))  # additions that do not wait for each other
                for number, at in enumerate(range(0, self.key_dim, LANES)):
                    key = code.read_floats(own, code.word(at))
                    for query in some:
                        asked = code.read(FLOATS, queries, code.word(query * self.key_dim + at))
                        name = (query, number % apart)
                        sums[name] = self.fused(asked, key, sums[name]) if name in sums else code.fmul(asked, key)
                for query in some:
                    score = code.reduced([each for (whose, _), each in sums.items() if whose == query])
                    code.store(score, code.gep(self.scores_of(query), [token]))

    def _sum(self, values: Any, count: Any, shares: list[Any]) -> None:
        """Add the values, each times its exponential, to what earlier sums are worth."""
        code = self.code
        for dims in parts(range(0, self.value_dim, LANES), BLOCK // LANES):
            for some in parts(range(self.group), VALUE_QUERIES):
                sums = {(query, at): code.alloca_once(FLOATS) for query in some for at in dims}
                for (query, at), place in sums.items():
                    before = code.read(FLOATS, self.out_of(query), code.word(at))
                    code.store(code.fmul(before, shares[query]), place)
                with code.loop(count) as token:
                    weights = {q: code.splat(code.load(code.gep(self.scores_of(q), [token])), LANES) for q in some}
                    own = self._token(values, token, self.value_dim)
                    for at in dims:
                        value = code.read_floats(own, code.word(at))
                        for query in some:
                            place = sums[query, at]
                            code.store(self.fused(weights[query], value, code.load(place)), place)
                for (query, at), place in sums.items():
                    code.write(code.load(place), self.out_of(query), code.word(at))
