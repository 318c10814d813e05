"""How many tokens at once a bound on activations allows, for a layer whose needs a token are known.

What lives at the same time in a decoder layer is counted as elements a token, generously: a norm in float32; the
queries, keys and values before and after their rotation, and what attention gives, summed up in float32; the hidden
states beside an MLP, and a few tensors as wide as it is within. ``scripts/bench_activations.py`` measures how near
that comes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierstore.budget import format_nbytes
from tierstore.errors import PlanError

CHUNK_TOKENS = 64
"""Chunks of more tokens are multiples of this, so that they fill whole pages."""

MASKED = 1 << 22
"""So many elements of a mask over pages at once, at most: more would not be faster."""


@dataclass(frozen=True)
class LayerShape:
    """What one token needs of a decoder layer, in elements of ``dtype_nbytes`` bytes, and of the head behind them.

    ``queries`` are heads times width, ``keys`` those of keys and values together, ``inner`` is the width of the MLP
    within. ``chunked_mlp`` says whether an MLP can be run over fewer rows than the rest of its layer. Attention over
    pages takes ``fixed_nbytes``, whatever the context and the chunk, and a block of a mask at a time, whose elements
    are ``masked_nbytes`` each and ``masked_least`` a row or more. Other attention has ``key_nbytes`` for every token
    and every key that it may see, in a dense mask or in scores that are written down, and ``context_nbytes`` for each
    position, in copies that a layer makes of its keys and values.
    """

    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    dtype_nbytes: int
    chunked_mlp: bool
    key_nbytes: int = 0
    context_nbytes: int = 0
    fixed_nbytes: int = 0
    masked_nbytes: int = 0
    masked_least: int = 0

    @property
    def attention_nbytes(self) -> int:
        """Of a token, while its layer is at a norm or at attention."""
        attention = (3 * self.hidden + 5 * self.queries + 3 * self.keys) * self.dtype_nbytes + 3 * 4 * self.queries
        norm = self.hidden * (2 * self.dtype_nbytes + 3 * 4)
        return max(attention, norm)

    @property
    def beside_nbytes(self) -> int:
        """Of a token, while its layer is at the MLP, but for what lives within that."""
        return 4 * self.hidden * self.dtype_nbytes

    @property
    def inner_nbytes(self) -> int:
        """Of a token within the MLP."""
        return (5 * self.inner + self.hidden) * self.dtype_nbytes

    @property
    def logits_nbytes(self) -> int:
        """Of one row of logits, and of the same row in float32."""
        return self.vocabulary * (self.dtype_nbytes + 4)


@dataclass(frozen=True)
class ActivationPlan:
    """``prefill_tokens`` of every row of a batch go through the model at a time, and of all these tokens together
    ``mlp_tokens`` through an MLP. Attention over pages takes ``block_nbytes`` for a block of a mask."""

    prefill_tokens: int
    mlp_tokens: int
    block_nbytes: int = 0


def build_activation_plan(nbytes: int, shape: LayerShape, *, batch: int, context: int) -> ActivationPlan:
    """The most tokens that ``nbytes`` of activations allow, for ``batch`` rows of at most ``context`` positions.

    A block of a mask grows with the bound, by a quarter of what is beyond the least that would do, up to ``MASKED``
    elements. Logits of one position a row are counted; more are a result that the caller asked for. Raises
    ``PlanError``, with the smallest number of bytes that would do, where one token a row does not fit.
    """
    keyed = shape.attention_nbytes + context * shape.key_nbytes
    # a dense mask, or what it is made of, lives on beside the MLP
    beside = shape.beside_nbytes + context * shape.key_nbytes
    least_inner = shape.inner_nbytes if shape.chunked_mlp else batch * shape.inner_nbytes
    fixed = shape.fixed_nbytes + batch * (shape.logits_nbytes + context * shape.context_nbytes)
    least_block = batch * shape.masked_least * shape.masked_nbytes
    needed = fixed + least_block + max(batch * keyed, batch * beside + least_inner)
    if nbytes < needed:
        raise PlanError(
            f"one token of {batch} rows with {context} positions needs {format_nbytes(needed)} of activations, the "
            f"budget has {format_nbytes(nbytes)}: raise Budget.activations to at least {needed} bytes",
            needed=needed,
        )
    block = min(least_block + (nbytes - needed) // 4, max(least_block, MASKED * shape.masked_nbytes))
    room = nbytes - fixed - block
    if shape.chunked_mlp:
        tokens = min(room // (batch * keyed), (room - least_inner) // (batch * beside))
    else:
        tokens = room // (batch * max(keyed, beside + shape.inner_nbytes))
    if tokens > CHUNK_TOKENS:
        tokens -= tokens % CHUNK_TOKENS
    within = (room - tokens * batch * beside) // shape.inner_nbytes
    return ActivationPlan(tokens, min(within, tokens * batch), block)
