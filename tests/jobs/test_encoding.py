"""What becomes tokens of a model, what does not, and what a job is judged to be by its first rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.jobs.made import good
from tests.jobs.toy import END, VOCABULARY, ToyTokenizer
from tierstore.errors import RowError
from tierstore.jobs.encoding import Encoder, end_tokens, special_tokens
from tierstore.jobs.rows import BadRow, Row
from tierstore.jobs.workload import Workload
from tierstore.sampling import Sampling

PAGE = 4


class Untemplated(ToyTokenizer):
    chat_template = None  # type: ignore[assignment]


class Refuses(ToyTokenizer):
    def apply_chat_template(self, *turns: Any, **options: Any) -> Any:
        raise ZeroDivisionError("roles must alternate")


TURNS = [{"role": "user", "content": "hi"}]


def test_prompts_are_taken_as_they_are_unless_they_are_to_be_chat() -> None:
    plain, chat = (Encoder(ToyTokenizer(), VOCABULARY, chat=chat) for chat in (False, True))
    assert plain.decode(plain.tokens("hi", None)) == "hi"
    assert chat.tokens("hi", None) == plain.tokens(None, TURNS)
    assert plain.decode([*plain.tokens(None, TURNS), END]) == "user-hi.assistant-"


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary", "messages", "said"),
    [
        (ToyTokenizer(), VOCABULARY, None, "no tokens"),
        (ToyTokenizer(), 3, TURNS, "another model's"),
        (Untemplated(), VOCABULARY, TURNS, "no chat template"),
        (Refuses(), VOCABULARY, TURNS, "roles must alternate"),
    ],
)
def test_what_cannot_be_tokens(tokenizer: Any, vocabulary: int, messages: Any, said: str) -> None:
    with pytest.raises(RowError, match=said):
        Encoder(tokenizer, vocabulary, chat=False).tokens("123", messages)


def test_a_special_token_to_stop_at_is_found_as_a_token() -> None:
    added = {END: AddedToken("<end>", special=True), 3: AddedToken("<plain>", special=False)}
    special = special_tokens(SimpleNamespace(added_tokens_decoder=added))
    assert (special, special_tokens(ToyTokenizer())) == ({"<end>": END}, {})
    encoder = Encoder(ToyTokenizer(), VOCABULARY, chat=False, special=special)
    assert encoder.stops(["a", "<end>", "<plain>"]) == (("a", "<plain>"), frozenset([END]))
    assert encoder.stops([]) == ((), frozenset())
    with pytest.raises(RowError, match=r"stop has '<end>\\n', .* special token '<end>'.*alone"):
        encoder.stops(["a", "<end>\n"])


@pytest.mark.parametrize(
    ("config", "ends"),
    [(None, {END}), ({"eos_token_id": 3}, {3}), ({"eos_token_id": [3, 4]}, {3, 4}), ({"eos_token_id": None}, {END})],
)
def test_end_tokens_are_those_of_the_model_or_else_the_tokenizers(config: Any, ends: set[int]) -> None:
    module = SimpleNamespace(generation_config=None if config is None else SimpleNamespace(**config))
    assert end_tokens(module, ToyTokenizer()) == ends


def test_a_job_is_judged_by_rows_that_will_not_fail() -> None:
    rows: list[Row | BadRow] = [
        good({"prompt": "abcdefghij", "max_new_tokens": 6}, 1),
        BadRow(2, None, "no row"),
        good({"prompt": "abcdefghxy", "max_new_tokens": 2, "n": 3}, 3),  # two pages are there by then
        good({"prompt": "123"}, 4),
        good({"prompt": "a" * 90, "max_new_tokens": 20}, 5),
    ]
    workload = Workload.of(rows, 50, Sampling())
    job, longest = workload.measure(Encoder(ToyTokenizer(), VOCABULARY, chat=False), PAGE, 100)
    assert (job.sequences, job.prompt_tokens, job.new_tokens, job.most_new_tokens) == (50, (10 + 2) / 4, 3, 6)
    assert longest == 16


def test_a_job_of_rows_that_nobody_knows() -> None:
    job, longest = Workload.unknown(Sampling(max_new_tokens=30)).measure(
        Encoder(ToyTokenizer(), VOCABULARY, chat=False), PAGE, None
    )
    assert job.new_tokens == job.most_new_tokens == 30
    assert longest == job.prompt_tokens + 30
