"""The line that answers a row: its samples, or why there are none, in the shape that the row came in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from tierstore.jobs.rows import CHAT, BadRow, Row

# Halves of characters are no UTF-8; readers that split text into lines take the others for ends of lines.
_TO_ESCAPE = re.compile("[\ud800-\udfff\u0085\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Generated:
    """A finished sequence: sample ``index``, from 0, of its row. ``seed`` is the one it was sampled with."""

    index: int
    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    seed: int


@dataclass(frozen=True, slots=True)
class JobName:
    """What answers in OpenAI's shape say of the job. ``fingerprint``: hexadecimal digits that tell jobs apart;
    ``created``: seconds since 1970; ``model``: for requests that name none."""

    fingerprint: str
    created: int
    model: str


def native_line(row: Row, generated: Generated) -> bytes:
    """One sample of a row: ``index`` is told where the row asks for several."""
    line: dict[str, Any] = {"id": row.id}
    if row.sampling.n > 1:
        line["index"] = generated.index
    return _encoded(
        line
        | {
            "text": generated.text,
            "prompt_tokens": generated.prompt_tokens,
            "completion_tokens": generated.completion_tokens,
            "finish_reason": generated.finish_reason,
            "seed": generated.seed,
        }
    )


def openai_line(row: Row, samples: Sequence[Generated], job: JobName) -> bytes:
    """All samples of an OpenAI request, as choices. ``seed`` of the row is told in the body, beside OpenAI's keys."""
    if row.openai is None or not samples:
        raise ValueError(f"row {row.line} is no OpenAI request, or has no samples")
    chat = row.openai.url == CHAT
    name = _name(job, row.line)
    prompt, completion = samples[0].prompt_tokens, sum(sample.completion_tokens for sample in samples)
    body = {
        "id": ("chatcmpl-" if chat else "cmpl-") + name,
        "object": "chat.completion" if chat else "text_completion",
        "created": job.created,
        "model": row.openai.model if row.openai.model is not None else job.model,
        "choices": [_choice(sample, chat) for sample in sorted(samples, key=lambda sample: sample.index)],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        "seed": samples[0].seed,
    }
    return _encoded(
        {
            "id": "batch_req_" + name,
            "custom_id": row.id,
            "response": {"status_code": 200, "request_id": "req_" + name, "body": body},
            "error": None,
        }
    )


def error_line(row: Row | BadRow, reason: str, job: JobName) -> bytes:
    """Why a row has no answer, with the number of its line."""
    if not row.openai:
        return _encoded({"line": row.line, "id": row.id, "error": reason})
    error = {"code": "invalid_request", "message": reason, "line": row.line}
    return _encoded({"id": "batch_req_" + _name(job, row.line), "custom_id": row.id, "response": None, "error": error})


def _choice(sample: Generated, chat: bool) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": sample.text}} if chat else {"text": sample.text}
    return {"index": sample.index, **said, "logprobs": None, "finish_reason": sample.finish_reason}


def _name(job: JobName, line: int) -> str:
    return sha256(f"{job.fingerprint} {line}".encode()).hexdigest()[:24]


def _encoded(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _TO_ESCAPE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"
