"""Sequences of a tiny decoder, computed side by side, and the same ones computed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.hf.paged import AMPLE, PAGE, ignore
from tierstore.backends import backend_for
from tierstore.budget import Budget
from tierstore.errors import PlanError
from tierstore.hf.batch.slices import Slice
from tierstore.hf.batch.tokens import Together, TokenModel
from tierstore.hf.kv.memory import KvMemory
from tierstore.hf.kv.shapes import dtype_of, layers_of
from tierstore.kvformats.named import kv_format

TOKENS = 16
"""Tokens of a micro-batch."""


def in_turn(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """One call after another."""
    return [call() for call in calls]


def kv_memory(
    model: Any, folder: Path | None = None, *, format: str | None = None, page_tokens: int = PAGE, **budget: Any
) -> KvMemory:
    """Pages of 8 tokens, all resident where no budget is given."""
    dtype = dtype_of(model)
    return KvMemory(
        layers_of(model),
        Budget(hbm=1, **(budget or {"kv_hbm": AMPLE})),
        dtype=dtype,
        form=kv_format(format, dtype),
        backend=backend_for("cpu"),
        recorder=ignore,
        folder=folder,
        page_tokens=page_tokens,
    )


@contextmanager
def token_model(
    model: Any, folder: Path | None = None, *, tokens: int = TOKENS, together: Together = in_turn, **memory: Any
) -> Iterator[TokenModel]:
    """``model`` by tokens, within; nothing may be left of its sequences at the end."""
    made = kv_memory(model, folder, **memory)
    try:
        batch = TokenModel(model, made, together, tokens=tokens)
        yield batch
        batch.close()
        batch.close()
        for kind in made.kinds:
            kind.table.reclaim(kind.table.usage().kept_pages)
        made.forget_freed()
        for kind in made.kinds:
            assert kind.table.usage().free_pages == kind.table.capacity
            assert not kind.open
            assert not kind.writable
        assert all(cells.open_cells == cells.hbm_cells == cells.ram_cells == 0 for cells in made.usage().cells)
    finally:
        made.close()


def smallest(model: Any, format: str | None = None, page_tokens: int = PAGE, **below: Any) -> int:
    """The smallest ``kv_hbm`` for ``model``."""
    try:
        kv_memory(model, Path("unused"), format=format, page_tokens=page_tokens, kv_hbm=1, **below)
    except PlanError as error:
        return error.needed
    raise AssertionError("a byte does not do")


def some_tokens(count: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompt_slice(sequence: int, tokens: Sequence[int]) -> Slice:
    """A prompt's tokens, of all of which logits are wanted."""
    return Slice(sequence, tuple(tokens), len(tokens), prompt=True)


def text_slice(sequence: int, *tokens: int) -> Slice:
    """Generated tokens, of all of which logits are wanted."""
    return Slice(sequence, tokens, len(tokens), prompt=False)


def alone(model: Any, prompt: Sequence[int], text: Sequence[int], **memory: Any) -> Tensor:
    """Logits of every token of a sequence that is the only one: the prompt at once, then token by token."""
    with token_model(model, **memory) as batch:
        sequence, _ = batch.add(prompt)
        found = batch.step([prompt_slice(sequence, prompt)])
        for token in text:
            found += batch.step([text_slice(sequence, token)])
        return torch.cat(found)


def greedy(batch: TokenModel, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """What follows each of ``prompts``, computed side by side."""
    numbers = [batch.add(prompt)[0] for prompt in prompts]
    slices = [Slice(n, tuple(prompt), 1, prompt=True) for n, prompt in zip(numbers, prompts, strict=True)]
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(new):
        for text, logits in zip(texts, batch.step(slices), strict=True):
            text.append(int(logits[-1].argmax()))
        slices = [Slice(n, (text[-1],), 1, prompt=False) for n, text in zip(numbers, texts, strict=True)]
    for number in numbers:
        batch.remove(number)
    return texts
