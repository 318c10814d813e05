"""Every text of a job is what its row says alone, whoever is beside it, and every row is answered once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs.toy import END, LETTERS, VOCABULARY, ToyModel, ToyTokenizer, toy_logits
from tierstore.batch_schedule import Limits
from tierstore.drafting import PassCost
from tierstore.errors import CapacityError, PageLostError, StoreReadError
from tierstore.hf.batch.choosing import Chooser
from tierstore.hf.batch.slices import Slice
from tierstore.jobs.drafts import Drafting
from tierstore.jobs.encoding import Encoder
from tierstore.jobs.engine import MOST_TRIES, Engine
from tierstore.jobs.rows import BadRow, Row
from tierstore.jobs.samples import Failed, Finished, seed_of
from tierstore.sampling import Sampling

ENCODER = Encoder(ToyTokenizer(), VOCABULARY, chat=False)
SEED = 7


def engine_of(
    model: ToyModel, *, sequences: int = 5, micro_batches: int = 2, encoder: Encoder = ENCODER, **options: Any
) -> Engine:
    room = model.capacity
    limits = Limits(model.tokens, micro_batches, sequences, room.page_tokens, room.pages, room.open_pages)
    options = {"ends": [END], "positions": None, "seed": SEED, **options}
    return Engine(model, encoder, limits=limits, **options)


def drafting_of(model: ToyModel, *, always: bool, micro_batches: int = 2) -> Drafting:
    cost = PassCost(model.tokens, micro_batches, compute_seconds=1.0, transfer_seconds=3.0)
    return Drafting(cost, always=always)


def answers_of(engine: Engine, rows: Iterable[Row | BadRow | None], **options: Any) -> list[Finished | Failed]:
    return [each for some in engine.answer(rows, **options) for each in some]


def row_of(line: int, prompt: str, **settings: Any) -> Row:
    return Row(line, f"r{line}", prompt, None, Sampling(**settings))


def alone(row: Row, index: int) -> tuple[str, str, int]:
    """Text, reason and tokens of a sample, without a job: the plain statement."""
    sampling, prompt = row.sampling, ENCODER.tokens(row.prompt, row.messages)
    chooser = Chooser(sampling, seed_of(row, SEED), index, prompt)
    tokens: list[int] = []
    while len(tokens) < sampling.max_new_tokens:
        tokens.append(chooser.choose(toy_logits([*prompt, *tokens]), tokens))
        text = ENCODER.decode(tokens)
        if tokens[-1] == END and not sampling.ignore_eos:
            return text, "stop", len(tokens)
        if found := [at for at in map(text.find, sampling.stop) if at >= 0]:
            return text[: min(found)], "stop", len(tokens)
    return ENCODER.decode(tokens), "length", len(tokens)


def check(rows: Sequence[Row], answers: Sequence[Finished | Failed]) -> None:
    finished = [each for each in answers if isinstance(each, Finished)]
    assert Counter((each.row.line, each.index) for each in finished) == Counter(
        (row.line, index) for row in rows for index in range(row.sampling.n)
    )
    for each in finished:
        assert (each.text, each.finish_reason, len(each.tokens)) == alone(each.row, each.index)
        assert each.seed == seed_of(each.row, SEED)
        assert each.prompt_tokens == len(ENCODER.tokens(each.row.prompt, each.row.messages))


prompts = st.tuples(
    st.sampled_from(["", "you are a helper. ", "you are a helper. be kind. "]), st.text("abc", max_size=9)
)
row_settings = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0.0, 0.7, 2.0]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "seed": st.none() | st.integers(0, 3),
        "stop": st.sampled_from([(), ("a",), ("ab", "é"), (" ",)]),
        "n": st.sampled_from([1, 1, 1, 2, 4]),
        "ignore_eos": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(st.tuples(prompts, row_settings), max_size=12),
    sequences=st.integers(1, 6),
    tokens=st.sampled_from([1, 4, 8]),
    pages=st.sampled_from([18, 30, 1000]),
    data=st.data(),
)
def test_each_row_is_answered_once_as_if_it_were_alone(
    asked: list[Any], sequences: int, tokens: int, pages: int, data: st.DataObject
) -> None:
    rows = [row_of(n, "".join(prompt) or "a", **given) for n, (prompt, given) in enumerate(asked, 1)]
    open_pages = data.draw(st.integers(sequences + 2, 40), label="open_pages")
    model = ToyModel(tokens=tokens, pages=pages, open_pages=open_pages)
    drafting = data.draw(st.sampled_from([None, True, False]), label="always draft")
    options: dict[str, Any] = {"drafting": None if drafting is None else drafting_of(model, always=drafting)}
    answers = answers_of(engine_of(model, sequences=sequences, **options), rows)
    check(rows, answers)
    assert not any(isinstance(each, Failed) for each in answers)
    assert model.sequences == {}  # nothing is left
    assert model.most_at_once <= sequences


def test_a_common_prefix_is_computed_once() -> None:
    system = "you are a helper. " * 5
    rows = [row_of(n, system + LETTERS[n] * 3, max_new_tokens=4) for n in range(1, 21)]
    model = ToyModel(tokens=16)
    engine = engine_of(model, sequences=20, micro_batches=8)
    check(rows, answers_of(engine, rows))
    shared = len(system) // model.capacity.page_tokens * model.capacity.page_tokens
    assert model.found == engine.counts.found_tokens == 19 * shared
    assert engine.counts.prompt_tokens == sum(len(str(row.prompt)) for row in rows) - 19 * shared


def test_samples_share_their_prompt() -> None:
    row = row_of(1, "tell me a story about a fox", n=8, max_new_tokens=3, temperature=1.0)
    model = ToyModel()
    engine = engine_of(model, sequences=8)
    check([row], answers_of(engine, [row]))
    assert engine.counts.prompt_tokens == len(str(row.prompt))


def test_a_batch_takes_few_passes() -> None:
    rows = [row_of(n, "ab", max_new_tokens=10, ignore_eos=True) for n in range(1, 9)]
    engine = engine_of(ToyModel(tokens=8), sequences=8, micro_batches=2)
    check(rows, answers_of(engine, rows))
    assert engine.counts.passes == 10


def test_rows_are_read_as_they_are_needed() -> None:
    read: list[int] = []

    def rows() -> Iterator[Row]:
        for line in range(1, 1000):
            read.append(line)
            yield row_of(line, "abc", max_new_tokens=2)

    answers = engine_of(ToyModel(), sequences=3).answer(rows())
    next(answers)
    assert len(read) <= 3 * 3 + 1


def test_rows_that_cannot_be_answered_fail_alone() -> None:
    bad = BadRow(3, None, "not JSON")
    good = [row_of(1, "abc", max_new_tokens=3), row_of(9, "abc", max_new_tokens=3)]
    rows: list[Row | BadRow] = [
        good[0],
        bad,
        row_of(4, "12345"),  # no tokens
        row_of(5, "a" * 40, max_new_tokens=11),
        row_of(6, "a" * 30, max_new_tokens=20),
        good[1],
    ]
    model = ToyModel(pages=10)
    answers = answers_of(engine_of(model, positions=50), rows)
    failed = {each.row.line: each.reason for each in answers if isinstance(each, Failed)}
    assert failed.keys() == {3, 4, 5, 6}
    assert failed[3] == "not JSON"
    assert "no tokens" in failed[4]
    assert "positions" in failed[5]
    assert "KV pages" in failed[6]
    check(good, [each for each in answers if isinstance(each, Finished)])


def test_only_samples_that_are_left_are_made() -> None:
    row = row_of(1, "abc", n=4, temperature=1.0, max_new_tokens=5)
    rows = [row, row_of(2, "x", max_new_tokens=2)]
    answers = answers_of(engine_of(ToyModel()), rows, left=lambda row: [1, 3][: row.sampling.n - 1])
    assert sorted((each.row.line, each.index) for each in answers if isinstance(each, Finished)) == [(1, 1), (1, 3)]


def test_messages_go_through_the_template() -> None:
    turns = [{"role": "user", "content": "hello"}]
    row = replace(row_of(1, "", max_new_tokens=3), prompt=None, messages=turns)
    (answer,) = answers_of(engine_of(ToyModel()), [row])
    assert isinstance(answer, Finished)
    assert answer.prompt_tokens == len("user-hello.assistant-")


LOST = PageLostError("a page is gone", cells=[(0, 0)])  # the toy says: of the oldest sequence
NOBODYS = PageLostError("a page is gone", cells=[])


@pytest.mark.parametrize("lost", [LOST, NOBODYS])
def test_lost_pages_are_computed_anew(lost: PageLostError) -> None:
    rows = [row_of(n, "hello", max_new_tokens=9, n=2, temperature=1.0, ignore_eos=True) for n in (1, 2, 3)]
    model = ToyModel()
    model.fail = [None, None, lost, None, None, None, lost]
    check(rows, answers_of(engine_of(model, sequences=4), rows))
    assert model.fail == []
    assert model.sequences == {}


def test_pages_that_are_lost_again_and_again_end_the_job() -> None:
    model = ToyModel()
    model.fail = [LOST] * (MOST_TRIES + 1)
    with pytest.raises(PageLostError):
        answers_of(engine_of(model), [row_of(1, "abc")])
    assert model.fail == []


def test_less_room_than_counted_on_makes_fewer_at_once() -> None:
    rows = [row_of(n, "hello", max_new_tokens=9, ignore_eos=True) for n in range(1, 6)]
    model = ToyModel()
    model.fail = [None, CapacityError("full"), None, CapacityError("full")]
    check(rows, answers_of(engine_of(model), rows))
    assert model.fail == []


def test_a_row_that_has_no_room_alone_fails() -> None:
    model = ToyModel()
    model.fail = [CapacityError("full")]
    rows = [row_of(n, "hello", max_new_tokens=2) for n in (1, 2, 3)]  # the others wait for the prompt of the first
    answers = answers_of(engine_of(model), rows)
    assert [(each.row.line, each.reason) for each in answers if isinstance(each, Failed)] == [(1, "full")]
    check(rows[1:], [each for each in answers if isinstance(each, Finished)])
    assert model.sequences == {}


@pytest.mark.parametrize("good_passes", [0, 1, 2])
def test_logits_that_are_no_numbers_fail_their_row_alone(good_passes: int) -> None:
    rows = [row_of(1, "hello", n=3, max_new_tokens=9, ignore_eos=True), row_of(2, "fox", max_new_tokens=9)]
    prompt = ENCODER.tokens("hello", None)

    class Overflows(ToyModel):
        def step(self, slices: Sequence[Slice]) -> list[torch.Tensor]:
            logits = super().step(slices)
            for each, rows in zip(slices, logits, strict=True):
                known = self.sequences[each.sequence]
                if known[: len(prompt)] == list(prompt) and len(known) == len(prompt) + good_passes:
                    rows.fill_(torch.nan)
            return logits

    model = Overflows()
    answers = answers_of(engine_of(model), rows)
    (failed,) = [each for each in answers if isinstance(each, Failed)]
    assert failed.row is rows[0]
    assert "nan" in failed.reason
    check(rows[1:], [each for each in answers if isinstance(each, Finished)])
    assert model.sequences == {}


def test_an_error_of_the_machine_ends_the_job() -> None:
    model = ToyModel()
    model.fail = [None, StoreReadError("the disk is gone")]
    with pytest.raises(StoreReadError):
        answers_of(engine_of(model), [row_of(1, "abc")])


def test_rows_may_come_when_they_like() -> None:
    """A source that has nothing yet does not hold up those that are under way."""
    rows = [row_of(n, "abc", max_new_tokens=6, ignore_eos=True) for n in (1, 2, 3)]
    engine = engine_of(ToyModel())
    answered: list[Finished | Failed] = []

    def source() -> Iterator[Row | None]:
        yield rows[0]
        while not answered:
            assert not engine.idle
            yield None
        yield rows[1]
        assert not engine.idle
        yield None
        yield rows[2]

    for some in engine.answer(source()):
        answered.extend(some)
    check(rows, answered)


@pytest.mark.parametrize("always", [True, False])
def test_drafts_save_passes_where_texts_repeat_themselves(always: bool) -> None:
    rows = [row_of(1, "abcabcabcabc", max_new_tokens=40, ignore_eos=True)]

    class Repeats(ToyModel):
        def step(self, slices: Sequence[Slice]) -> list[torch.Tensor]:
            logits = super().step(slices)
            for each, wanted in zip(slices, logits, strict=True):
                known = self.sequences[each.sequence]
                for row, end in enumerate(range(len(known) - each.logits, len(known))):
                    wanted[row] = torch.eye(VOCABULARY)[(known[end] + 1) % 3]
            return logits

    model = Repeats()
    engine = engine_of(model, drafting=drafting_of(model, always=always))
    (answer,) = answers_of(engine, rows)
    assert isinstance(answer, Finished)
    assert answer.text == "abcabcabcabcabcabcabcabcabcabcabcabcabca"
    assert engine.counts.passes < 20
    assert engine.counts.accepted_tokens > 20
    assert engine.counts.generated_tokens == 40
    assert model.sequences == {}


def test_a_text_stops_at_a_special_token_that_it_does_not_show() -> None:
    rows = [row_of(line, "abc", seed=line, temperature=1.0, max_new_tokens=200) for line in range(1, 9)]
    told = [replace(row, sampling=replace(row.sampling, stop=("<end>",), ignore_eos=True)) for row in rows]
    encoder = Encoder(ToyTokenizer(), VOCABULARY, chat=False, special={"<end>": END})
    results = answers_of(engine_of(ToyModel(), encoder=encoder), told)
    assert {(each.row.line, each.text, each.finish_reason) for each in results if isinstance(each, Finished)} == {
        (row.line, *alone(row, 0)[:2]) for row in rows
    }
    (failed,) = answers_of(engine_of(ToyModel(), encoder=encoder), [row_of(1, "abc", stop=("<end>!",))])
    assert isinstance(failed, Failed)
    assert "'<end>'" in failed.reason
