"""How many tokens a micro-batch has when every row of it is computed alike, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tierstore.hf.kv.shapes import dtype_of

_VECTOR = 32
"""Numbers that torch's functions of single numbers take at once on a CPU, at most. What is left over at the end of a
thread's share is computed by other code, which for SiLU and its like in float32 gives other bits."""
_SHARE = 1 << 15
"""Numbers of a thread's share at least; some functions divide by all threads all the same."""
_TIMES = 16


def even_tokens(module: nn.Module, tokens: int, threads: int) -> int | None:
    """The fewest tokens, at least ``tokens``, with which the shares of ``threads`` threads are whole vectors in every
    function of what ``module`` computes in between; None where no number up to 16 times as large does.

    That is what makes a row's bits independent of its place in float32 on a CPU; otherwise ``tokens`` will do."""
    if dtype_of(module) != torch.float32:
        return tokens
    widths = set(_widths(module))
    return next((n for n in range(tokens, _TIMES * tokens + 1) if all(_even(n * w, threads) for w in widths)), None)


def _even(numbers: int, threads: int) -> bool:
    """Whether ``numbers`` numbers are divided into whole vectors."""
    shares = {min(threads, -(-numbers // _SHARE)), threads if numbers > _SHARE // 2 else 1}
    return numbers % _VECTOR == 0 and all(-(-numbers // count) % _VECTOR == 0 for count in shares)


def _widths(module: nn.Module) -> Iterator[int]:
    """Of what products give, that of the vocabulary left out; some models take half of one as a gate."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    for each in module.modules():
        width = getattr(each, "out_features", getattr(each, "nf", None))
        if isinstance(width, int) and each is not head:
            yield width
            if width % 2 == 0:
                yield width // 2
