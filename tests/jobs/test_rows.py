"""Lines become rows, or say what is wrong with them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs.made import good, parsed, request
from tierstore.jobs.lines import Line
from tierstore.jobs.row_settings import HARMLESS, NEUTRAL
from tierstore.jobs.rows import BadRow, Row, parse_row
from tierstore.sampling import Sampling

HOSTILE = Path(__file__).parent / "hostile"


def bad(raw: bytes | dict[str, Any]) -> BadRow:
    row = parsed(raw)
    assert isinstance(row, BadRow), row
    assert row.line == 1
    assert len(row.reason) < 500
    return row


def test_a_row_of_ours() -> None:
    row = good({"id": "a", "prompt": "hi", "temperature": 1, "max_tokens": 5, "stop": "x", "metadata": {"any": []}})
    assert row == Row(1, "a", "hi", None, Sampling(max_new_tokens=5, temperature=1.0, stop=("x",)))
    assert good({"prompt": "hi"}, 17).id == 17
    assert good({"id": None, "prompt": "hi", "n": None}, 17) == Row(17, 17, "hi", None, Sampling())
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    row = good({"messages": [{"role": "system", "content": ""}, {"role": "user", "name": "Li", "content": parts}]})
    assert row.messages == [{"role": "system", "content": ""}, {"role": "user", "name": "Li", "content": "one, two"}]
    assert row.prompt is None
    assert row.openai is None


def test_an_openai_request() -> None:
    row = good(request("r-1", {"messages": [{"role": "user", "content": "hi"}], "model": "gpt", "top_p": 0.5, "n": 2}))
    assert (row.id, row.sampling.top_p, row.sampling.n) == ("r-1", 0.5, 2)
    assert row.openai is not None
    assert (row.openai.model, row.openai.url) == ("gpt", "/v1/chat/completions")
    row = good(request("r-2", {"prompt": ["hi"], "max_completion_tokens": 9}, url="/v1/completions"))
    assert (row.prompt, row.sampling.max_new_tokens) == ("hi", 9)
    assert parsed(b'{"custom_id": "a", "body": []}') == BadRow(
        1, "a", "body is a JSON array, an object is needed", openai=True
    )


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_cannot_be_honoured_is_an_error(name: str) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    row = bad(request("r", chat | {name: ["surprise"]}))
    assert (row.id, row.openai) == ("r", True)
    assert row.reason == f"{name} cannot be honoured here: leave it out"
    for value in (None, *NEUTRAL[name]):
        assert good(request("r", chat | {name: value})) == good(request("r", chat))
    bad(request("r", chat | {name: 1 if name != "best_of" else 2}))  # 1 is not True


@pytest.mark.parametrize("name", sorted(HARMLESS - {"model"}))
def test_what_changes_no_text_is_ignored(name: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert good(request("r", body | {name: {"a": 1}})) == good(request("r", body))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no prompt and messages"),
        ({"prompt": "a", "messages": []}, "both prompt and messages"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": 5}, "prompt is a JSON number"),
        ({"prompt": ["a", "b"]}, "give each prompt a row"),
        ({"prompt": [1, 2]}, "give each prompt a row"),
        ({"prompt": "a", "temprature": 1}, "'temprature'.*did you mean 'temperature'"),
        ({"prompt": "a", "zzz": 1}, "'zzz'.*metadata"),
        ({"prompt": "a", "tools": []}, "unknown key 'tools'"),
        ({"prompt": "a", "x" * 10_000: 1}, "unknown key"),
        ({"prompt": "a", "id": ""}, "id is ''"),
        ({"prompt": "a", "id": True}, "id is True"),
        ({"prompt": "a", "id": 1.5}, "id is 1.5"),
        ({"prompt": "a", "id": 1 << 63}, "id is"),
        ({"prompt": "a", "id": 1 << 9000}, "id is a whole number of 9001 bits"),
        ({"prompt": "a", "id": "x" * 1025}, "id is"),
        ({"prompt": "a", "max_tokens": "5"}, "^max_tokens is '5'"),
        ({"prompt": "a", "max_tokens": 5, "max_new_tokens": 6}, "differ"),
        ({"prompt": "a", "max_tokens": [5]}, "^max_tokens is"),
        ({"prompt": "a", "max_tokens": 5, "max_new_tokens": "x" * 10_000}, "^max_new_tokens is"),
        ({"prompt": "a", "max_tokens": True, "max_completion_tokens": 1}, "^max_tokens is True"),
        ({"prompt": "\ud800"}, "half a surrogate"),
        ({"prompt": "a", "stop": ["\udc00"]}, "stop has half"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "messages is 'hi'"),
        ({"messages": ["hi"]}, r"messages\[0\] is a JSON string"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "role is 'usr'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "role is an array"),
        ({"messages": [{"role": "user"}]}, "content is a JSON null"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate"),
        ({"messages": [{"role": "user", "content": "a", "name": 3}]}, "name is a JSON number"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "unknown key 'tool_calls'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "text is a JSON number"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "only 'text'"),
        (request("r", url="/v1/embeddings"), "url is '/v1/embeddings'"),
        (request("r", url=["/v1/completions"]), "url is an array"),
        (request("r", method="GET"), "method is 'GET'"),
        (request("r", {"messages": [], "model": 3}), "body.model"),
        (request("r", {"prompt": "a"}), "unknown key 'prompt'"),
        (request("r", {}), "body has no messages"),
        (request(7), "custom_id is 7"),
        (request(None), "custom_id is None"),
        (request("r", priority=1), "unknown key 'priority'"),
        (request("r", {"messages": [{"role": "user", "content": "a"}], "response_fmt": 1}), "'response_format'"),
    ],
)
def test_wrong_rows_say_what_is_wrong(row: dict[str, Any], reason: str) -> None:
    assert re.search(reason, bad(row).reason), bad(row).reason


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("*.jsonl")), ids=lambda path: path.stem)
def test_hostile_lines_of_the_repository(path: Path) -> None:
    """The first line of each file is bad, and the second, which says why, is good."""
    first, second = path.read_bytes().split(b"\n")[:2]
    told = json.loads(second)
    assert told["metadata"] in bad(first).reason
    good(second)


def test_metadata_is_advised_where_it_can_be() -> None:
    message = {"role": "tool", "content": "4", "tool_call_id": "c"}
    assert bad({"messages": [message]}).reason == "messages[0] has the unknown key 'tool_call_id': leave it out"
    assert bad(request("r", {"messages": [], "zzz": 1})).reason.endswith("leave it out, or put it into 'metadata'")


def test_depth_and_size_are_bounded() -> None:
    assert "nested too deep" in bad(b'{"prompt": ' + b"[" * 2_000_000).reason
    for key in ("prompt", "temperature", "max_tokens", "messages", "id", "stop"):
        for depth in range(700, 1000, 10):
            bad(f'{{"max_new_tokens": 5, "{key}": {"[" * depth}{"]" * depth}}}'.encode())
    assert parse_row(Line(3, 0, None, True), Sampling()) == BadRow(
        3, None, "the line is longer than 64 MiB: shorten it"
    )
    assert "twice" in bad(b"{" + b'"a": 1, ' * 100_000 + b'"b": 2}').reason


def test_blank_lines_and_marks() -> None:
    assert parsed(b"") is None
    assert parsed(b" \t\r") is None
    assert good(b'\xef\xbb\xbf{"prompt": "a"}\r').prompt == "a"
    assert isinstance(parsed(b'\xef\xbb\xbf{"prompt": "a"}', 2), BadRow)


def json_values() -> st.SearchStrategy[Any]:
    plain = [None, True, 0, 1, -1, 1 << 70, 0.5, math.nan, math.inf, "", "a", "user", "\ud800", "/v1/completions"]
    scalars = st.sampled_from(plain)
    message = st.tuples(scalars, scalars).map(lambda two: [{"role": two[0], "content": two[1]}])
    return scalars | st.lists(scalars, max_size=2) | message


KEYS = ["id", "prompt", "messages", "custom_id", "body", "method", "url", "stop", "seed", "n", "top_p", "metadata"]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), json_values(), max_size=4), st.binary(max_size=30))
def test_no_line_raises(table: dict[str, Any], noise: bytes) -> None:
    for raw in (json.dumps(table).encode(), noise, json.dumps({"custom_id": "a", "body": table}).encode()):
        row = parsed(raw)
        if isinstance(row, Row):
            assert (row.prompt is None) != (row.messages is None)
            Sampling.checked(**{name: getattr(row.sampling, name) for name in Sampling.__dataclass_fields__})
