"""A model whose sequences are computed each by itself, with a cache of its own, in one pass over the weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tierstore.errors import CapacityError, ModuleError, PageLostError
from tierstore.hf.batch.single import Single, is_croppable, is_recurrent, make_cache
from tierstore.hf.batch.slices import Capacity, Slice
from tierstore.hf.kv.shapes import dtype_of
from tierstore.hf.splitting import Forward

PAGE_TOKENS = 256
"""Positions are counted in pages of this many, as there are none."""

BOUNDLESS = 1 << 40
TRIAL_TOKENS = 6
TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.01}
"""How far logits of a trial may be apart, of the largest one, as sums add in another order. Else ``1e-3``."""

Together = Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]


@dataclass
class _Sequence:
    """``waiting`` are tokens of a prompt that are not computed yet; of a lost sequence nothing is left."""

    single: Single
    waiting: list[int] = field(default_factory=list)
    lost: bool = False

    @property
    def length(self) -> int:
        return len(self.single.tokens) + len(self.waiting)


class SequenceModel:
    """Sequences of ``module``, any transformers decoder, each with the cache that ``generate`` would make for it.

    What ``TokenModel`` does for models that cannot compute tokens of many sequences side by side. A sequence of a step
    is a call of ``module`` with batch 1; ``together`` runs all of them in one pass over the weights. So its logits are
    those of ``module`` alone, bit by bit, whatever else is in the batch.

    A prompt is computed when it is all there, or, by models without a recurrent state, ``tokens`` at a time from its
    beginning, each part in a pass of its own. So the numbers do not depend on how a prompt was cut into slices. They
    may, in the last bits, on how many generated or drafted tokens are in a slice: products of one row add up in another
    order than those of several.

    Nothing is shared or found. A module that takes no cache of transformers computes all of a sequence every time.
    Where ``speculates`` is False, sequences cannot be cropped, and those of a step that fails are lost: the error says
    so, and the next step with one raises ``PageLostError``.

    With ``positions``, a step beyond so many of all sequences together raises ``CapacityError``: ``capacity`` counts
    them in pages of 256. Else it is boundless, and the caller bounds sequences by ``nbytes``.
    """

    def __init__(self, module: nn.Module, together: Together, *, tokens: int, positions: int | None = None) -> None:
        """Raises ``ModuleError`` for encoder-decoders, and for what takes no tokens."""
        config: Any = module.config
        self.module = module
        self.tokens = tokens
        self._together = together
        self._forward = Forward(inspect.signature(module.forward).parameters, config)
        if getattr(config, "is_encoder_decoder", False) or "input_ids" not in self._forward.parameters:
            raise ModuleError(f"{type(module).__name__} is no decoder of tokens: only these generate text in batches")
        self._vocabulary = int(config.get_text_config(decoder=True).vocab_size)
        cache = make_cache(module, self._forward)
        self._recurrent = cache is not None and is_recurrent(cache)
        self.speculates = cache is None or is_croppable(cache)
        """Whether ``crop`` works."""
        pages = BOUNDLESS if positions is None else max(positions // PAGE_TOKENS, 1)
        self.capacity = Capacity(PAGE_TOKENS, pages, pages)
        self._sequences: dict[int, _Sequence] = {}
        self._number = 0
        attends = cache is not None and not self._recurrent and getattr(module, "_supports_attention_backend", False)
        self._trusted = bool(attends and getattr(config, "is_causal", True))

    @property
    def tokens(self) -> int:
        """Most tokens of a prompt that go through the model at once; may be set between steps."""
        return self._tokens

    @tokens.setter
    def tokens(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"{tokens} tokens at a time: at least 1 is needed")
        self._tokens = tokens

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the caches take now."""
        return sum(each.single.nbytes for each in self._sequences.values())

    def add(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A new sequence, and 0: none of its tokens are there already."""
        return self._put(_Sequence(Single(make_cache(self.module, self._forward)))), 0

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens, in memory of its own."""
        at = self._at(sequence)
        return self._put(_Sequence(at.single.copy(), list(at.waiting)))

    def length(self, sequence: int) -> int:
        """Positions of a sequence."""
        return self._at(sequence).length

    def crop(self, sequence: int, length: int) -> None:
        """Keep the first ``length`` positions. Raises ``ValueError`` for more than there are, where the model does not
        speculate, and for what a window has moved on from; tokens of the last step can be taken back."""
        at = self._at(sequence)
        if not 0 <= length <= at.length:
            raise ValueError(f"sequence {sequence} has {at.length} tokens and cannot be cut to {length}")
        if length < len(at.single.tokens):
            if not self.speculates:
                raise ValueError(f"{type(self.module).__name__} cannot take tokens out of its cache: start anew")
            at.single.crop(length)
        del at.waiting[length - len(at.single.tokens) :]

    def seal(self, sequence: int, tokens: Sequence[int]) -> None:
        """Nothing: no sequence finds what another has."""
        self._at(sequence)

    def remove(self, sequence: int) -> None:
        """End a sequence, also a lost one."""
        del self._sequences[sequence]

    def losing(self, error: PageLostError) -> tuple[int, ...]:
        """The sequences that are lost: remove them."""
        return tuple(number for number, each in self._sequences.items() if each.lost)

    def step(self, slices: Sequence[Slice]) -> list[Tensor]:
        """Compute the tokens of ``slices``, of different sequences; of each float32 [logits, vocabulary] on the CPU.

        With any error nothing of it happened, or its sequences are lost. Raises ``CapacityError``, ``PageLostError``
        for lost sequences, and ``ValueError`` for a sequence named twice."""
        if len({each.sequence for each in slices}) < len(slices):
            raise ValueError("a sequence is in one slice of a step at most: join its tokens, or take two steps")
        mine = [self._at(each.sequence) for each in slices]
        self._check_room(slices)
        if not self._trusted:
            self._try()
            self._trusted = True
        parts = [self._parts(at, each) for at, each in zip(mine, slices, strict=True)]
        busy = [number for number, cut in enumerate(parts) if cut]
        for number in busy:
            mine[number].single.begin()
        before = [(len(at.single.tokens), list(at.waiting)) for at in mine]
        try:
            with torch.no_grad():
                calls = [partial(self._run, mine[n].single, parts[n], slices[n].logits) for n in busy]
                found = dict(zip(busy, self._together(calls), strict=True))
            for at, each, cut in zip(mine, slices, parts, strict=True):
                at.waiting += each.tokens
                del at.waiting[: sum(map(len, cut))]
        except BaseException as error:
            for at, (_, waiting) in zip(mine, before, strict=True):
                at.waiting = waiting
            self._undo([(slices[n].sequence, mine[n], before[n][0]) for n in busy], error)
            raise
        none = torch.empty(0, self._vocabulary)
        return [found.get(number, none) for number in range(len(slices))]

    def close(self) -> None:
        """End all sequences. Idempotent."""
        self._sequences.clear()

    # ---- what goes through the model

    def _parts(self, at: _Sequence, new: Slice) -> list[list[int]]:
        """The tokens to compute now, as they go through the model one part after the other."""
        there, tokens = len(at.single.tokens), [*at.waiting, *new.tokens]
        whole = new.logits > 0 or not new.prompt
        ends = list(range(self.tokens - there % self.tokens, len(tokens) + 1, self.tokens)) if new.prompt else []
        if whole and (not ends or ends[-1] < len(tokens)):
            ends.append(len(tokens))
        parts = [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        at_once = whole and not there and len(parts) == 1
        if at_once or not parts or max(map(len, parts)) == 1 or not self._recurrent:
            return parts
        if there:
            return [[token] for token in tokens]
        return [tokens] if whole else []

    def _run(self, single: Single, parts: Sequence[Sequence[int]], logits: int) -> Tensor:
        """Float32 [logits, vocabulary] on the CPU, of the last tokens."""
        kept: list[Tensor] = []
        for part in parts:
            made = self._forward_of(single, part, min(logits, len(part)))
            kept = [*kept, made][-logits:] if logits else [made]
            single.tokens += part
        return torch.cat(kept)[max(sum(map(len, kept)) - logits, 0) :]

    def _forward_of(self, single: Single, tokens: Sequence[int], logits: int) -> Tensor:
        past = len(single.tokens)
        ids = tokens if single.cache is not None else [*single.tokens, *tokens]
        device, total = next(self.module.parameters()).device, past + len(tokens)
        offered: dict[str, Any] = {
            "position_ids": torch.arange(total - len(ids), total, device=device)[None],
            "use_cache": single.cache is not None,
            "logits_to_keep": max(logits, 1),
            "return_dict": True,
        }
        given = {name: value for name, value in offered.items() if name in self._forward.parameters}
        if single.cache is not None:
            given[self._forward.cache] = single.cache
        made: Tensor = self.module(input_ids=torch.tensor([ids], device=device), **given).logits
        return made[0, made.shape[1] - logits :].float().cpu()

    def _try(self) -> None:
        """Random tokens, together and one by one, with another sequence between: some modules keep what is of a
        sequence where all sequences see it, and in some tokens see those behind them. Raises ``ModuleError``."""
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(self._vocabulary, (TRIAL_TOKENS,), generator=random).tolist()
        half = TRIAL_TOKENS // 2
        one, other = (Single(make_cache(self.module, self._forward)) for _ in range(2))
        with torch.no_grad():
            begun, whole = self._together(
                [partial(self._run, one, [tokens[:half]], half), partial(self._run, other, [tokens], TRIAL_TOKENS)]
            )
            (rest,) = self._together([partial(self._run, one, [[token] for token in tokens[half:]], half)])
        near = TOLERANCE.get(dtype_of(self.module), 1e-3) * float(whole.abs().max())
        apart = ((torch.cat([begun, rest]) - whole).abs() > near).any(-1)
        if int(apart[:half].sum()) > 1 or int(apart[half:].sum()) > 1:  # one may: a token between two experts
            raise ModuleError(
                f"{type(self.module).__name__} gives a token other logits when tokens follow it, or when another "
                f"sequence is computed beside its own: it does not generate in batches, call its generate instead"
            )

    # ---- sequences

    def _put(self, sequence: _Sequence) -> int:
        self._number += 1
        self._sequences[self._number] = sequence
        return self._number

    def _at(self, sequence: int) -> _Sequence:
        at = self._sequences[sequence]
        if at.lost:
            raise PageLostError(
                f"sequence {sequence} was lost in a step that failed: remove it, and start anew", cells=[(sequence, 0)]
            )
        return at

    def _check_room(self, slices: Sequence[Slice]) -> None:
        grown = {each.sequence: len(each.tokens) for each in slices}
        pages = sum(-(-(at.length + grown.get(number, 0)) // PAGE_TOKENS) for number, at in self._sequences.items())
        if pages > self.capacity.pages:
            raise CapacityError(
                f"sequences of {pages} pages of {PAGE_TOKENS} positions are more than the {self.capacity.pages} there "
                f"is room for: end some, or give a larger number of positions"
            )

    def _undo(self, parts: Sequence[tuple[int, _Sequence, int]], error: BaseException) -> None:
        if self.speculates:
            for _, at, before in parts:
                at.single.undo(before)
            return
        for _, at, _ in parts:
            at.single, at.waiting, at.lost = Single(None), [], True
        if parts:
            error.add_note(f"sequences {', '.join(str(number) for number, _, _ in parts)} are lost: start them anew")
