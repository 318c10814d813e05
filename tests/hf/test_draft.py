"""A model that drafts follows its texts, and rows of a dense cache are sequences as a model computes them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.hf.batches import in_turn, some_tokens
from tests.hf.paged import decoder
from tierstore.errors import CapacityError, ModuleError, RowError
from tierstore.hf.batch.alone import SequenceModel
from tierstore.hf.batch.dense import LEAST_SHARED, DenseModel
from tierstore.hf.batch.draft import CATCHING_UP, PROMPT_TOKENS, DraftModel, DraftText, Model
from tierstore.hf.batch.slices import Slice

LLAMA = decoder("LlamaForCausalLM")
VOCABULARY = 96


def dense(sequences: int = 3, tokens: int = 64, model: Any = LLAMA) -> DenseModel:
    return DenseModel(model, sequences=sequences, tokens=tokens)


def plain(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits of all tokens, at once and without a cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(tokens)])).logits[0].float()
    return logits


def close(one: Tensor, other: Tensor) -> bool:
    """Sums may add in another order."""
    return torch.allclose(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM"])
def test_rows_are_sequences(name: str) -> None:
    """They begin at any time, have any lengths, are cut, and leave."""
    model = decoder(name)
    batch, random = dense(model=model), torch.Generator().manual_seed(0)
    texts: dict[int, list[int]] = {}
    for turn in range(30):
        if len(texts) < 3 and turn % 3 == 0:
            texts[batch.add([1])[0]] = []
        if turn % 7 == 6:
            batch.remove(gone := min(texts))
            del texts[gone]
        counts = {
            each: int(torch.randint(1, 5, (), generator=random)) for each in sorted(texts) if turn % 4 or each % 2
        }
        new = {each: some_tokens(count, turn + each) for each, count in counts.items()}
        logits = batch.step([Slice(each, tuple(tokens), len(tokens), turn % 2 == 0) for each, tokens in new.items()])
        for each, rows in zip(new, logits, strict=True):
            texts[each] += new[each]
            assert batch.length(each) == len(texts[each])
            assert close(rows, plain(model, texts[each])[-len(new[each]) :])
        for each in texts:
            texts[each] = texts[each][: max(len(texts[each]) - turn % 3, 0)]
            batch.crop(each, len(texts[each]))
    batch.close()
    batch.close()
    assert [batch.add([1])[1] for _ in range(3)] == [0, 0, 0], "all rows are free"


def test_what_texts_begin_with_is_copied() -> None:
    batch, begin = dense(), some_tokens(LEAST_SHARED + 5)
    first, found = batch.add(begin)
    assert found == 0
    batch.step([Slice(first, tuple(begin), 0, True)])
    assert batch.add([*begin[: LEAST_SHARED - 1], 95, 95])[1] == 0, "too little"
    second, found = batch.add([*begin[:-2], 95, 95])
    assert found == len(begin) - 2
    (logits,) = batch.step([Slice(second, (95, 95), 1, False)])
    assert close(logits, plain(LLAMA, [*begin[:-2], 95, 95])[-1:])


def test_rows_and_their_lengths_are_bounded() -> None:
    batch = dense(2, 8)
    one, two = (batch.add([1])[0] for _ in range(2))
    with pytest.raises(CapacityError, match="end a sequence"):
        batch.add([1])
    batch.step([Slice(one, (1,) * 8, 1, True)])
    before = batch.step([Slice(two, (5, 6), 1, True)])
    with pytest.raises(CapacityError, match="room for 8"):
        batch.step([Slice(two, (7,), 1, False), Slice(one, (1,), 1, False)])
    assert (batch.length(one), batch.length(two)) == (8, 2), "nothing of it happened"
    batch.crop(two, 1)
    assert torch.equal(batch.step([Slice(two, (6,), 1, False)])[0].argmax(), before[0].argmax())
    with pytest.raises(ValueError, match="cannot be cut"):
        batch.crop(two, 3)
    assert batch.step([]) == []


def test_models_that_have_no_rows() -> None:
    with pytest.raises(ModuleError, match="window"):
        dense(model=decoder("MistralForCausalLM"))


# ---- a model that drafts


def greedy(logits: Tensor, drafted: Sequence[int]) -> int:
    return int(logits.argmax())


def followed_by(model: Any, tokens: Sequence[int], most: int) -> list[int]:
    """What a model takes for likely."""
    text = list(tokens)
    for _ in range(most):
        text.append(int(plain(model, text)[-1].argmax()))
    return text[len(tokens) :]


def drafting(model: Model, *, sequences: int = 3, tokens: int = 400, **more: Any) -> DraftModel:
    return DraftModel(model, sequences=sequences, tokens=tokens, **{"vocabulary": VOCABULARY, **more})


MODELS: dict[str, Callable[[], tuple[Any, Model]]] = {
    "dense": lambda: (LLAMA, dense(3, 400)),
    "alone": lambda: (LLAMA, SequenceModel(LLAMA, in_turn, tokens=64)),
    "window": lambda: ((model := decoder("MistralForCausalLM")), SequenceModel(model, in_turn, tokens=64)),
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_drafts_are_what_the_model_would_say(made: Callable[[], tuple[Any, Model]]) -> None:
    """However a text went on meanwhile: as drafted, in part, otherwise, or by many tokens at once."""
    module, model = made()
    drafts = drafting(model)
    texts = {n: some_tokens(count, n) for n, count in enumerate((3, PROMPT_TOKENS + 20, 2))}
    for turn in range(6):
        wanted = [DraftText(n, tuple(text), 1 + (turn + n) % 4, greedy) for n, text in texts.items()]
        found = drafts.draft(wanted)
        assert found == [followed_by(module, each.tokens, each.most) for each in wanted]
        for n, drafted in enumerate(found):
            accepted = (turn + 2 * n) % (len(drafted) + 1)
            texts[n] += [*drafted[:accepted], *some_tokens(1 + (turn == 2) * (CATCHING_UP + 5), turn)]
    drafts.forget(1)
    drafts.forget(1)
    wanted = [DraftText(7, tuple(some_tokens(4, 7)), 2, greedy)]
    assert drafts.draft(wanted) == [followed_by(module, wanted[0].tokens, 2)]
    drafts.close()
    drafts.close()


@given(
    turns=st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=4, unique_by=lambda t: t[0])),
    gone=st.lists(st.integers(0, 4), max_size=6),
)
@settings(max_examples=15, deadline=None)
def test_texts_come_and_go(turns: list[list[tuple[int, int]]], gone: list[int]) -> None:
    """Nothing of one is drafted for another; what has no room has no drafts."""
    drafts, texts = drafting(dense(2, 24), sequences=2, tokens=24), {n: some_tokens(3 + n, n) for n in range(5)}
    known: set[int] = set()
    for turn in turns:
        wanted = [DraftText(n, tuple(texts[n]), most, greedy) for n, most in turn]
        for each, drafted in zip(wanted, drafts.draft(wanted), strict=True):
            had_room = len(each.tokens) < 24 and (each.sequence in known or len(known) < 2)
            known |= {each.sequence} if had_room else set()
            room = min(each.most, 24 - len(each.tokens) + 1) if had_room else 0
            assert drafted == followed_by(LLAMA, each.tokens, room)
            texts[each.sequence] += [*drafted[:2], 9]
        if gone:
            drafts.forget(number := gone.pop())
            known.discard(number)
            texts[number] = some_tokens(3, number)


def test_tokens_that_one_of_the_models_does_not_know() -> None:
    text, likely = some_tokens(5), followed_by(LLAMA, some_tokens(5), 1)[0]
    (drafted,) = drafting(dense(), vocabulary=likely).draft([DraftText(0, tuple(text), 3, lambda logits, _: likely)])
    assert drafted == []
    (drafted,) = drafting(dense(), vocabulary=max(text)).draft([DraftText(0, tuple(text), 3, greedy)])
    assert drafted == []
    seen: list[int] = []

    def look(logits: Tensor, drafted: Sequence[int]) -> int:
        seen.append(len(logits))
        return 3

    drafting(dense(), vocabulary=50).draft([DraftText(0, (3, 4), 2, look)])
    assert seen == [50, 50]


def test_logits_of_which_none_can_be_chosen() -> None:
    def refuse(logits: Tensor, drafted: Sequence[int]) -> int:
        if drafted:
            raise RowError("no number")
        return 4

    drafts = drafting(dense())
    assert drafts.draft([DraftText(0, (3, 4), 3, refuse), DraftText(1, (5,), 2, greedy)]) == [
        [4],
        followed_by(LLAMA, [5], 2),
    ]


def test_seconds_are_measured() -> None:
    now = iter(range(10**6))
    drafts = drafting(dense(2, 200), sequences=2, tokens=200, clock=lambda: float(next(now)))
    drafts.measure()
    assert (drafts.step_seconds, drafts.prompt_seconds) == (1.0, 1 / PROMPT_TOKENS)
    assert drafts.begin_seconds(0, 100) == 100 / PROMPT_TOKENS
    assert drafts.begin_seconds(0, 200) is None, "too long"
    for number in range(2):
        drafts.draft([DraftText(number, tuple(some_tokens(100)), 1, greedy)])
    assert drafts.begin_seconds(0, 101 + CATCHING_UP) == (CATCHING_UP + 2) * drafts.prompt_seconds
    assert drafts.begin_seconds(0, 99 + CATCHING_UP) == 0
    assert drafts.begin_seconds(2, 100) is None, "no room"


def test_an_error_of_the_model_leaves_texts_as_they_were() -> None:
    class Fails(DenseModel):
        fail = 0

        def step(self, slices: Sequence[Slice]) -> list[Tensor]:
            self.fail -= 1
            if self.fail == 0:
                raise RuntimeError("out of memory")
            return super().step(slices)

    model = Fails(LLAMA, sequences=2, tokens=64)
    drafts, text = drafting(model, sequences=2, tokens=64), some_tokens(20)
    for fail in range(1, 5):
        model.fail = fail
        with pytest.raises(RuntimeError, match="out of memory"):
            drafts.draft([DraftText(0, tuple(text), 4, greedy)])
        model.fail = 0
        assert drafts.draft([DraftText(0, tuple(text), 3, greedy)]) == [followed_by(LLAMA, text, 3)]
        text += some_tokens(3, fail)
