"""A language model of a few lines: its logits are a function of all tokens before, and its pages are counted.

It refuses whatever the contract of a token model does not allow, so that a test of a job is a test of how it asks too.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierstore.errors import CapacityError, PageLostError
from tierstore.hf.batch.slices import Capacity, Slice

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?-é"
END, BOS = len(LETTERS), len(LETTERS) + 1
VOCABULARY = len(LETTERS) + 2


class ToyTokenizer:
    """A token a letter; what it does not know is left out. ``<end>`` is special."""

    eos_token_id = END
    chat_template = "turns"

    def __call__(self, text: str) -> Mapping[str, Any]:
        return {"input_ids": [LETTERS.index(letter) for letter in text if letter in LETTERS]}

    def apply_chat_template(self, turns: Sequence[Mapping[str, Any]], **options: Any) -> Mapping[str, Any]:
        return self("".join(f"{turn['role']}-{turn['content']}." for turn in turns) + "assistant-")

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(LETTERS[token] for token in tokens if token < len(LETTERS))


def toy_logits(tokens: Sequence[int], sharpness: float = 2.0) -> Tensor:
    """Float32 [VOCABULARY]: what follows ``tokens``."""
    seed = zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes())
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(VOCABULARY, dtype=np.float32) * sharpness)


class ToyModel:
    """The token model. ``calls`` counts passes; ``fail`` is what the next ones raise, in order."""

    speculates = True

    def __init__(self, *, tokens: int = 8, page_tokens: int = 4, pages: int = 1000, open_pages: int = 1000) -> None:
        self.tokens = tokens
        self.capacity = Capacity(page_tokens, pages, open_pages)
        self.calls = self.computed = self.found = self.most_at_once = 0
        self.fail: list[BaseException | None] = []
        self.sequences: dict[int, list[int]] = {}
        self._pages: dict[int, list[object]] = {}
        self._sealed: dict[tuple[int, ...], object] = {}
        self._next = 0
        self.closed = False

    def add(self, tokens: Sequence[int]) -> tuple[int, int]:
        size, sequence = self.capacity.page_tokens, self._number()
        pages: list[object] = []
        while (end := (len(pages) + 1) * size) < len(tokens) and tuple(tokens[:end]) in self._sealed:
            pages.append(self._sealed[tuple(tokens[:end])])
        self._pages[sequence] = pages
        self.sequences[sequence] = list(tokens[: len(pages) * size])
        self.found += len(pages) * size
        return sequence, len(pages) * size

    def fork(self, sequence: int) -> int:
        copy = self._number()
        self.sequences[copy], self._pages[copy] = list(self.sequences[sequence]), list(self._pages[sequence])
        return copy

    def length(self, sequence: int) -> int:
        return len(self.sequences[sequence])

    def crop(self, sequence: int, length: int) -> None:
        assert 0 <= length <= self.length(sequence)
        del self.sequences[sequence][length:]
        del self._pages[sequence][-(-length // self.capacity.page_tokens) :]

    def seal(self, sequence: int, tokens: Sequence[int]) -> None:
        assert self.sequences[sequence][: len(tokens)] == list(tokens)
        size = self.capacity.page_tokens
        for number in range(len(tokens) // size):
            self._sealed.setdefault(tuple(tokens[: (number + 1) * size]), self._pages[sequence][number])

    def remove(self, sequence: int) -> None:
        del self.sequences[sequence], self._pages[sequence]

    def step(self, slices: Sequence[Slice]) -> list[Tensor]:
        assert slices
        assert len({each.sequence for each in slices}) == len(slices)
        if self.fail and (error := self.fail.pop(0)) is not None:
            raise error
        grown = {each.sequence: self._grown(each) for each in slices}
        held = {id(page) for sequence, pages in self._pages.items() for page in grown.get(sequence, pages)}
        if len(held) > self.capacity.pages:
            raise CapacityError(f"{len(held)} pages are needed and there are {self.capacity.pages}")
        size = self.capacity.page_tokens
        opened = sum(-(-(self.length(each.sequence) % size + len(each.tokens)) // size) for each in slices)
        if opened > self.capacity.open_pages:
            raise CapacityError(f"{opened} pages would be open and {self.capacity.open_pages} can be")
        self._pages.update(grown)
        self.calls += 1
        self.computed += sum(len(each.tokens) for each in slices)
        self.most_at_once = max(self.most_at_once, len(slices))
        logits = []
        for each in slices:
            known = self.sequences[each.sequence]
            known.extend(each.tokens)
            ends = range(len(known) - each.logits + 1, len(known) + 1)
            rows = [toy_logits(known[:end]) for end in ends]
            logits.append(torch.stack(rows) if rows else torch.empty(0, VOCABULARY))
        return logits

    def losing(self, error: PageLostError) -> tuple[int, ...]:
        return tuple(sorted(self.sequences)[: len(error.cells)])

    def close(self) -> None:
        self.closed = True

    def _grown(self, each: Slice) -> list[object]:
        """The pages of its sequence afterwards; one that others see too is copied before it is written to."""
        pages, size = list(self._pages[each.sequence]), self.capacity.page_tokens
        length = self.length(each.sequence)
        if length % size and sum(pages[-1] in others for others in self._pages.values()) > 1:
            pages[-1] = object()
        while len(pages) * size < length + len(each.tokens):
            pages.append(object())
        return pages

    def _number(self) -> int:
        self._next += 1
        return self._next
