"""A line of a file of prompts as a row: what is asked, with which settings, and in which shape to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tierstore.errors import RowError
from tierstore.jobs.ids import Id
from tierstore.jobs.lines import MAX_LINE_NBYTES, Line, kind_of, read_object
from tierstore.jobs.row_settings import HARMLESS, LENGTHS, NEUTRAL, SETTINGS, check_keys, check_neutral, check_text
from tierstore.jobs.row_settings import merge_settings as _merge
from tierstore.sampling import Sampling

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
"""What an OpenAI request may ask."""
ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_ID_CHARACTERS = 1024

_ROW = frozenset({"id", "prompt", "messages", "metadata", *SETTINGS, *LENGTHS})
_REQUEST = frozenset({"custom_id", "method", "url", "body"})
_BODY = frozenset({*SETTINGS, *LENGTHS, *HARMLESS, *NEUTRAL})
_MESSAGE = frozenset({"role", "content", "name"})


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """The envelope of a row that came as an OpenAI batch request. ``model`` is what its body asked for, if anything."""

    method: str
    url: str
    model: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """A row to answer: its ``prompt``, or its ``messages`` of ``role``, ``content`` and perhaps ``name``, all text.

    ``line`` counts from 1, blank lines too. ``id`` is the row's own, its ``custom_id``, or else its line."""

    line: int
    id: Id
    prompt: str | None
    messages: list[dict[str, str]] | None
    sampling: Sampling
    openai: OpenAIRequest | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that cannot be answered, and why. ``id`` where it could be read; ``openai``: answer in that shape."""

    line: int
    id: Id | None
    reason: str
    openai: bool = False


def parse_row(line: Line, defaults: Sampling) -> Row | BadRow | None:
    """The row in a line; None for a blank one. Whatever the line holds, it raises nothing.

    A row of ours has ``prompt`` or ``messages``, and perhaps ``id``, settings (``max_new_tokens`` also by OpenAI's
    names) and ``metadata``, which is ignored. A line with ``custom_id`` or ``body`` is an OpenAI batch request to
    ``/v1/chat/completions`` or ``/v1/completions``. Any other key is an error, and so is a setting of OpenAI's that
    cannot be honoured (``row_settings.NEUTRAL``); those of ``row_settings.HARMLESS`` are ignored."""
    raw = line.raw
    if raw is None:
        return BadRow(line.number, None, f"the line is longer than {MAX_LINE_NBYTES >> 20} MiB: shorten it")
    if line.number == 1 and raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]  # a byte order mark
    if not raw.strip():
        return None
    id: Id | None = None
    openai = False
    try:
        try:
            table = read_object(raw)
        except ValueError as error:
            raise RowError(str(error)) from None
        openai = "custom_id" in table or "body" in table
        id = _id_of(table, "custom_id" if openai else "id", line.number)
        return _request(line.number, id, table, defaults) if openai else _row(line.number, id, table, defaults)
    except RowError as error:
        return BadRow(line.number, id, str(error), openai)
    except RecursionError:  # what was just read may still be too deep to be shown in a message
        return BadRow(line.number, id, "arrays or objects in it are nested too deep", openai)


def _row(line: int, id: Id, table: dict[str, Any], defaults: Sampling) -> Row:
    check_keys(table, _ROW, "the row")
    prompt, messages = table.get("prompt"), table.get("messages")
    if (prompt is None) == (messages is None):
        raise RowError(f"{'no' if prompt is None else 'both'} prompt and messages: exactly one of them is needed")
    return Row(
        line,
        id,
        None if prompt is None else _prompt(prompt),
        None if messages is None else _messages(messages),
        _merge(table, defaults),
    )


def _request(line: int, id: Id, table: dict[str, Any], defaults: Sampling) -> Row:
    check_keys(table, _REQUEST, "the request")
    body = table.get("body")
    if not isinstance(body, dict):
        raise RowError(f"body is a JSON {kind_of(body)}, an object is needed")
    method, url, model = table.get("method", "POST"), table.get("url", CHAT), body.get("model")
    if method != "POST":
        raise RowError(f"method is {_short(method)}, 'POST' is needed")
    if url not in (CHAT, COMPLETIONS):
        raise RowError(f"url is {_short(url)}, {CHAT!r} or {COMPLETIONS!r} is needed")
    if not isinstance(model, str | None):
        raise RowError(f"body.model is a JSON {kind_of(model)}, a string is needed")
    what = "messages" if url == CHAT else "prompt"
    check_keys(body, _BODY | {what}, "body")
    check_neutral(body)
    if body.get(what) is None:
        raise RowError(f"body has no {what}, {url} needs it")
    return Row(
        line,
        id,
        _prompt(body["prompt"]) if what == "prompt" else None,
        _messages(body["messages"]) if what == "messages" else None,
        _merge(body, defaults),
        OpenAIRequest(method, url, model),
    )


def _id_of(table: dict[str, Any], key: str, line: int) -> Id:
    id: Any = table.get(key)
    if id is None and key == "id":
        return line
    good = (type(id) is int and -(1 << 63) <= id < 1 << 63) or (
        isinstance(id, str) and 0 < len(id) <= MOST_ID_CHARACTERS
    )
    if not good or (key == "custom_id" and not isinstance(id, str)):
        or_int = " or a whole number of 64 bits" if key == "id" else ""
        raise RowError(f"{key} is {_short(id)}, a string of 1 to {MOST_ID_CHARACTERS} characters{or_int} is needed")
    checked: Id = id
    return checked


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise RowError(f"prompt is a JSON {kind_of(prompt)}, one text is needed: give each prompt a row")
    if not prompt:
        raise RowError("prompt is empty, at least one character is needed")
    check_text(prompt, "prompt")
    return prompt


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise RowError(f"messages is {_short(messages)}, a list with at least one message is needed")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, what: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RowError(f"{what} is a JSON {kind_of(message)}, an object is needed")
    told = {key: value for key, value in message.items() if value is not None}  # null asks for nothing
    check_keys(told, _MESSAGE, what)
    role, name = told.get("role"), told.get("name")
    if role not in ROLES:
        raise RowError(f"{what}.role is {_short(role)}, one of {', '.join(ROLES)} is needed")
    content = told.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{what}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise RowError(f"{what}.content is a JSON {kind_of(content)}, text is needed")
    check_text(content, f"{what}.content")
    if name is None:
        return {"role": role, "content": content}
    if not isinstance(name, str):
        raise RowError(f"{what}.name is a JSON {kind_of(name)}, a string is needed")
    check_text(name, f"{what}.name")
    return {"role": role, "content": content, "name": name}


def _part(part: Any, what: str) -> str:
    """The text of a part of a message."""
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise RowError(f"{what} is of type {_short(kind)}, only 'text' can be read")
    check_keys(part, ("type", "text"), what)
    if not isinstance(part.get("text"), str):
        raise RowError(f"{what}.text is a JSON {kind_of(part.get('text'))}, a string is needed")
    text: str = part["text"]
    return text


def _short(value: object) -> str:
    if isinstance(value, dict | list):
        return f"an array of {len(value)}" if isinstance(value, list) else "an object"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    return text if len(text := repr(value)) <= 60 else f"{text[:60]}..."
