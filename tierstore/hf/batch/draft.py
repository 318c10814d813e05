"""A small model that suggests how texts of a large one go on: it follows each of them, and chooses as they would."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tierstore.errors import CapacityError, RowError
from tierstore.hf.batch.slices import Slice

PROMPT_TOKENS = 128
"""Tokens of a prompt that go through the model at once."""
CATCHING_UP = 8
"""Up to so many tokens that a text has got meanwhile go into the first step; more have a step of their own."""
FEW = 2
"""A step in which each text has so many new tokens at most takes as long as one with a single token each."""
_KEPT = 0.9  # of the seconds of a step as they were known


class Model(Protocol):
    """What drafts are computed with: ``DenseModel``, or ``SequenceModel`` or ``TokenModel``."""

    def add(self, tokens: Sequence[int]) -> tuple[int, int]: ...
    def length(self, sequence: int) -> int: ...
    def crop(self, sequence: int, length: int) -> None: ...
    def remove(self, sequence: int) -> None: ...
    def step(self, slices: Sequence[Slice]) -> list[Tensor]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class DraftText:
    """A text by the number of its ``sequence``: all its ``tokens``, those of the prompt too, and how many are to be
    drafted at ``most``. ``choose`` gives a token from its logits, float32 [vocabulary], and the drafted ones before."""

    sequence: int
    tokens: Sequence[int]
    most: int
    choose: Callable[[Tensor, Sequence[int]], int]


@dataclass(slots=True)
class _Followed:
    """A text in ``sequence`` of the model, which has ``tokens``: the first ``sure`` are the text's."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    sure: int = 0


class DraftModel:
    """Drafts for up to ``sequences`` texts of up to ``tokens`` tokens, prompts included, with ``model``.

    It has a sequence for each text, which it begins when the text is first drafted for, and which catches up with the
    text every time. ``vocabulary`` are the tokens that both models know: others are not drafted. What it drafts need
    not be right, so nothing here is exact. ``clock`` gives seconds.
    """

    def __init__(
        self,
        model: Model,
        *,
        sequences: int,
        tokens: int,
        vocabulary: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._sequences, self._tokens, self._vocabulary = model, sequences, tokens, vocabulary
        self._clock = clock
        self._followed: dict[int, _Followed] = {}
        self.step_seconds = 0.0
        """Of a step in which each text gets a token, as it was lately."""
        self.prompt_seconds = 0.0
        """Of each token of a prompt."""

    def measure(self) -> None:
        """Find ``step_seconds`` and ``prompt_seconds`` by tokens that mean nothing."""
        count = min(PROMPT_TOKENS, self._tokens - 4)
        if count < 1:
            return
        sequence, _ = self._model.add([0])
        seconds = []
        for tokens in ((0,) * count, (0,) * count, (0,), (0,), (0,)):
            self._model.crop(sequence, 0 if len(tokens) == count else count)
            began = self._clock()
            self._model.step([Slice(sequence, tokens, 1, len(tokens) > FEW)])
            seconds.append(self._clock() - began)
        self._model.remove(sequence)
        self.prompt_seconds, self.step_seconds = seconds[1] / count, min(seconds[2:])

    def begin_seconds(self, sequence: int, tokens: int) -> float | None:
        """What it takes before the first token is drafted for a text of ``tokens``; None where there is no room."""
        followed = self._followed.get(sequence)
        if tokens >= self._tokens or (followed is None and len(self._followed) >= self._sequences):
            return None
        missing = tokens - (0 if followed is None else followed.sure)
        return 0.0 if missing <= CATCHING_UP else missing * self.prompt_seconds

    def draft(self, texts: Sequence[DraftText]) -> list[list[int]]:
        """Up to ``most`` tokens for each of ``texts``: fewer where there is no room, or nothing can be chosen."""
        drafts: list[list[int]] = [[] for _ in texts]
        under_way: list[tuple[int, _Followed, list[int]]] = []
        for number, text in enumerate(texts):
            followed = self._follow(text)
            if followed is not None and text.most > 0:
                under_way.append((number, followed, self._missing(followed, text)))
        while under_way:
            logits = self._step([(followed, new) for _, followed, new in under_way])
            going_on = []
            for (number, followed, _), rows in zip(under_way, logits, strict=True):
                text, drafted = texts[number], drafts[number]
                token = self._choose(text, rows[0], drafted)
                if token is None:
                    continue
                drafted.append(token)
                if len(drafted) < text.most and len(followed.tokens) < self._tokens:
                    going_on.append((number, followed, [token]))
            under_way = going_on
        return drafts

    def forget(self, sequence: int) -> None:
        """The text, which may be unknown, is gone."""
        if (followed := self._followed.pop(sequence, None)) is not None:
            self._model.remove(followed.sequence)

    def close(self) -> None:
        """Forget all texts. Idempotent."""
        self._followed.clear()
        self._model.close()

    def _follow(self, text: DraftText) -> _Followed | None:
        """Its sequence, in which nothing is that is not the text's; None where there can be none."""
        followed = self._followed.get(text.sequence)
        known = text.tokens if followed is None else text.tokens[followed.sure :]
        if self.begin_seconds(text.sequence, len(text.tokens)) is None or max(known) >= self._vocabulary:
            return None
        if followed is None:
            return self._begin(text)
        most = min(len(followed.tokens), len(text.tokens) - 1)  # the last one is computed anyway, for its logits
        same = followed.sure
        while same < most and followed.tokens[same] == text.tokens[same]:
            same += 1
        try:
            self._model.crop(followed.sequence, same)
        except ValueError:  # a window has moved on
            self.forget(text.sequence)
            return self._begin(text)
        del followed.tokens[same:]
        followed.sure = same
        return followed

    def _begin(self, text: DraftText) -> _Followed | None:
        try:
            sequence, there = self._model.add(text.tokens)
        except CapacityError:
            return None
        followed = self._followed[text.sequence] = _Followed(sequence, list(text.tokens[:there]), there)
        return followed

    def _missing(self, followed: _Followed, text: DraftText) -> list[int]:
        """The tokens that its sequence lacks; of many, all but the last ones go through the model now."""
        while len(new := text.tokens[followed.sure :]) > PROMPT_TOKENS:
            self._step([(followed, new[:PROMPT_TOKENS])])
            followed.sure += PROMPT_TOKENS
        if len(new) > CATCHING_UP:
            self._step([(followed, new[:-1])])
            new = new[-1:]
        followed.sure = len(text.tokens) - 1
        return list(new)

    def _step(self, parts: Sequence[tuple[_Followed, Sequence[int]]]) -> list[Tensor]:
        """The logits of the last token of each."""
        most = max(len(new) for _, new in parts)
        began = self._clock()
        logits = self._model.step([Slice(at.sequence, tuple(new), 1, len(new) > FEW) for at, new in parts])
        seconds = self._clock() - began
        if most <= FEW:
            self.step_seconds = _KEPT * self.step_seconds + (1 - _KEPT) * seconds
        elif len(parts) == 1 and most >= PROMPT_TOKENS // 2:
            self.prompt_seconds = _KEPT * self.prompt_seconds + (1 - _KEPT) * seconds / most
        for at, new in parts:
            at.tokens += new
        return logits

    def _choose(self, text: DraftText, logits: Tensor, drafted: Sequence[int]) -> int | None:
        try:
            token = text.choose(logits[: self._vocabulary], drafted)
        except RowError:  # its logits are no numbers, which says nothing of the text
            return None
        return token if token < self._vocabulary else None
