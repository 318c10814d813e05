"""A model that computes tokens of many sequences side by side, each over its own pages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tierstore.errors import PageLostError
from tierstore.hf.batch.attention import register
from tierstore.hf.batch.cache import TokenCache
from tierstore.hf.batch.capacity import capacity_of
from tierstore.hf.batch.passes import MicroPass, Passing
from tierstore.hf.batch.sequences import Growth, Sequences
from tierstore.hf.batch.slices import Slice
from tierstore.hf.batch.support import check
from tierstore.hf.batch.widened import Widened
from tierstore.hf.kv.attending import attending, attention_configs
from tierstore.hf.kv.memory import KvMemory
from tierstore.hf.splitting import Forward

Together = Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]


class TokenModel:
    """Sequences of ``module``, a transformers decoder, whose keys and values are in pages of ``memory``.

    All that it computes goes through calls of exactly ``tokens`` tokens, ``input_ids`` [1, tokens], the last of a pass
    padded. A token's logits depend on the tokens before it in its sequence, on whether they were a prompt's, and on
    ``tokens``; not, bit by bit, on other sequences, on how its own was divided into steps, or on where pages are, as
    far as the module's products of ``tokens`` rows give each row the same bits wherever it is, and pages keep all bits.

    ``together`` runs calls of the module, unit by unit in the order given, and returns what they return. One thread
    uses this and ``memory`` at a time. Sequences are numbers that ``add`` and ``fork`` give; ``KeyError`` for others.
    """

    speculates = True
    """``crop`` works."""

    def __init__(self, module: nn.Module, memory: KvMemory, together: Together, *, tokens: int) -> None:
        """Raises ``ModuleError`` for modules and pages that this cannot be done with."""
        check(module, memory)
        self.module, self.memory = module, memory
        self.tokens = tokens
        self.capacity = capacity_of(memory.plan.kinds)
        self._together = together
        self._sequences = Sequences(memory.kinds)
        self._forward = Forward(inspect.signature(module.forward).parameters, module.config)
        self._configs = attention_configs(module)
        self._attention = register()
        self._widened = Widened(module)
        self._windows = {each.layer: each.window for each in memory.layers}
        self._by_layer = True  # as the last pass went that had several micro-batches

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch; may be set between steps."""
        return self._tokens

    @tokens.setter
    def tokens(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"micro-batches of {tokens} tokens: at least 1 is needed")
        self._tokens = tokens

    def add(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A new sequence that will begin with ``tokens``; how many of them, at most all but one, it has already, since
        pages that hold them were found."""
        self.memory.begin()
        return self._sequences.add(tokens)

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens; it shares all pages until one of the two goes on."""
        return self._sequences.fork(sequence)

    def length(self, sequence: int) -> int:
        """Positions of a sequence."""
        return self._sequences[sequence].length

    def crop(self, sequence: int, length: int) -> None:
        """Keep the first ``length`` positions. Raises ``ValueError`` for more than there are, and for what a sliding
        window has given back; drafted tokens of the last step can always be taken back."""
        self._sequences.crop(sequence, length)
        self.memory.forget_freed()

    def seal(self, sequence: int, tokens: Sequence[int]) -> None:
        """Let the full pages of the first ``tokens`` be found by ``add``, as far as they were computed as a prompt."""
        self._sequences.seal(sequence, tokens)

    def remove(self, sequence: int) -> None:
        """End a sequence. Sealed pages stay while nothing else needs the room."""
        self._sequences.remove(sequence)
        self.memory.forget_freed()

    def step(self, slices: Sequence[Slice]) -> list[Tensor]:
        """Compute the tokens of ``slices``, of different sequences, in one pass; of each float32 [logits, vocabulary]
        on the CPU.

        With any error nothing of it happened. Raises ``CapacityError`` where pages lack, ``PageLostError`` where some
        cannot be read back (``losing`` says whose), ``ValueError`` for a sequence named twice."""
        if len({each.sequence for each in slices}) < len(slices):
            raise ValueError("a sequence is in one slice of a step at most: join its tokens, or take two steps")
        if not slices:
            return []
        self.memory.begin()
        mine = [self._sequences[each.sequence] for each in slices]
        starts = [each.length for each in mine]
        growth = Growth(
            self.memory.kinds,
            [(sequence, len(each.tokens), each.prompt) for sequence, each in zip(mine, slices, strict=True)],
        )
        try:
            passing = Passing(
                self.memory,
                slices,
                starts,
                [[sequence.numbers[kind] for sequence in mine] for kind in range(len(self.memory.kinds))],
                growth.appended,
                tokens=self.tokens,
                by_layer=self._by_layer,
            )
            logits = self._logits(passing, len(slices))
            passing.finish()
        except BaseException as error:
            growth.undo()
            for kind, page in self._lost(error):
                self.memory.kinds[kind].table.forget(page)
            self.memory.forget_freed()
            raise
        growth.settle()
        for each in slices:
            self._sequences.pass_window(each.sequence, 0 if each.prompt else len(each.tokens))
        self.memory.forget_freed()
        return logits

    def losing(self, error: PageLostError) -> tuple[int, ...]:
        """The sequences that hold pages which were lost: remove them."""
        return self._sequences.holding(self._lost(error))

    def close(self) -> None:
        """End all sequences, and leave the module as it was found. Idempotent."""
        self._widened.close()
        for sequence in self._sequences:
            self._sequences.remove(sequence)
        self.memory.forget_freed()

    def _logits(self, passing: Passing, slices: int) -> list[Tensor]:
        """Run the calls of a pass; the logits that each slice wants."""
        calls = [self._call(each) for each in passing.micro_batches]
        with torch.no_grad(), attending(self._configs, self._attention), self._widened.used():
            outputs = self._together(calls)
        if len(passing.micro_batches) > 1:
            self._by_layer = passing.order[1] == 1
        found: list[list[Tensor]] = [[] for _ in range(slices)]
        for each, logits in zip(passing.micro_batches, outputs, strict=True):
            at = 0
            for part in each.micro_batch.parts:
                found[part.slice].append(logits[at : at + part.logits])
                at += part.logits
        return [torch.cat(parts) for parts in found]

    def _call(self, micro: MicroPass) -> Callable[[], Tensor]:
        """A call of the module that gives float32 [wanted rows, vocabulary] on the CPU."""
        batch, padding = micro.micro_batch, self.tokens - len(micro.micro_batch.tokens)
        given: dict[str, Any] = {
            "input_ids": torch.tensor([[*batch.tokens, *[0] * padding]], device=self.memory.device),
            "position_ids": torch.tensor([[*batch.positions, *[0] * padding]], device=self.memory.device),
            self._forward.cache: TokenCache(micro, self._windows),
            "use_cache": True,
            "return_dict": True,
        }
        if not batch.wanted and "logits_to_keep" in self._forward.parameters:
            given["logits_to_keep"] = 1  # or all: two shapes, so that nobody's numbers depend on how many want some

        def call() -> Tensor:
            logits: Tensor = self.module(**given).logits
            wanted = torch.tensor(batch.wanted, dtype=torch.long, device=logits.device)
            return logits[0].index_select(0, wanted).float().cpu()

        return call

    def _lost(self, error: BaseException) -> list[tuple[int, int]]:
        """The kind and the number of each page that ``error`` says is lost."""
        cells = error.cells if isinstance(error, PageLostError) else ()
        kind_of = self.memory.kind_of
        return [(kind_of[layer], page) for layer, page in cells if isinstance(layer, int) and layer in kind_of]
