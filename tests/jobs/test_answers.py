"""The lines of results and errors, in both shapes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs.made import good, request
from tierstore.jobs.answers import Generated, JobName, error_line, native_line, openai_line
from tierstore.jobs.lines import read_object
from tierstore.jobs.rows import BadRow

JOB = JobName("abc", 1_700_000_000, "tiny")


def sample(index: int = 0, text: str = "hällo") -> Generated:
    return Generated(index, text, 5, 2 + index, "stop" if index == 0 else "length", 9)


def test_ours() -> None:
    line = native_line(good({"id": "a", "prompt": "x"}), sample())
    assert line.decode() == (
        '{"id": "a", "text": "hällo", "prompt_tokens": 5, "completion_tokens": 2, "finish_reason": "stop", "seed": 9}\n'
    )
    assert json.loads(native_line(good({"prompt": "x", "n": 2}, 4), sample(1)))["index"] == 1
    failed: Any = json.loads(error_line(BadRow(3, None, "why"), "why", JOB))
    assert failed == {"line": 3, "id": None, "error": "why"}


def test_a_chat() -> None:
    row = good(request("r", {"messages": [{"role": "user", "content": "hi"}], "model": "gpt", "n": 2}), 4)
    told = json.loads(openai_line(row, [sample(1), sample(0)], JOB))
    body = told["response"].pop("body")
    assert told.pop("id").startswith("batch_req_")
    assert told["response"].pop("request_id").startswith("req_")
    assert told == {"custom_id": "r", "response": {"status_code": 200}, "error": None}
    assert body.pop("id").startswith("chatcmpl-")
    assert body == {
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "gpt",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": "hällo"},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, reason in ((0, "stop"), (1, "length"))
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10},
        "seed": 9,
    }
    assert openai_line(row, [sample(0), sample(1)], JOB) == openai_line(row, [sample(1), sample(0)], JOB)


def test_a_completion() -> None:
    row = good(request("r", {"prompt": "hi"}, url="/v1/completions"), 5)
    body = json.loads(openai_line(row, [sample()], JOB))["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [{"index": 0, "text": "hällo", "logprobs": None, "finish_reason": "stop"}]


def test_an_error_in_openais_shape() -> None:
    told = json.loads(error_line(BadRow(7, "r", "why", openai=True), "why", JOB))
    assert told.pop("id").startswith("batch_req_")
    error = {"code": "invalid_request", "message": "why", "line": 7}
    assert told == {"custom_id": "r", "response": None, "error": error}


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=20) | st.sampled_from(["\ud800x", "\u2028", "\x85\r\n"]))
def test_any_text_comes_back(text: str) -> None:
    line = native_line(good({"prompt": "x"}), sample(text=text))
    assert line.endswith(b"\n")
    assert len(line.decode().splitlines()) == 1
    told = read_object(line)["text"]
    assert told.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")
