"""Which keys of a row are settings, and which of OpenAI's cannot be honoured."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from tierstore.errors import RowError
from tierstore.sampling import Sampling

SETTINGS = frozenset(Sampling.__dataclass_fields__)
"""Names of settings, in a row of ours and in the body of an OpenAI request."""
LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting."""
HARMLESS = frozenset(
    (
        "metadata",
        "model",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    )
)
"""Keys of an OpenAI body that are ignored: whatever they say, the text stays the same (calls of tools have none)."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Keys of an OpenAI body that cannot be honoured, and the values (besides null) that ask for nothing."""


def merge_settings(given: dict[str, Any], defaults: Sampling) -> Sampling:
    """``defaults`` with the settings among ``given``; null leaves the default. Raises ``RowError``."""
    settings = {name: value for name, value in given.items() if name in SETTINGS}
    lengths = {name: _length(name, given[name]) for name in LENGTHS if given.get(name) is not None}
    if len(set(lengths.values())) > 1:
        raise RowError(f"{' and '.join(f'{name} {value}' for name, value in lengths.items())} differ: give one of them")
    if lengths:
        settings["max_new_tokens"] = next(iter(lengths.values()))
    for stop in given["stop"] if isinstance(given.get("stop"), list) else [given.get("stop")]:
        if isinstance(stop, str):
            check_text(stop, "stop")
    return Sampling.checked(defaults, **settings)


def _length(name: str, value: Any) -> int:
    try:
        return Sampling.checked(max_new_tokens=value).max_new_tokens
    except RowError as error:
        raise RowError(str(error).replace("max_new_tokens", name, 1)) from None


def check_neutral(body: dict[str, Any]) -> None:
    """Raise ``RowError`` where a body asks for what cannot be honoured."""
    for name in NEUTRAL.keys() & body.keys():
        value = body[name]
        if value is not None and not any(type(value) is type(good) and value == good for good in NEUTRAL[name]):
            raise RowError(f"{name} cannot be honoured here: leave it out")


def check_keys(table: dict[str, Any], known: Collection[str], what: str) -> None:
    """Raise ``RowError`` naming a key of ``table`` that is not ``known``, and the nearest that is."""
    for name in table:
        if name not in known:
            near = get_close_matches(name[:100], known, 1)
            aside = "leave it out, or put it into 'metadata'" if "metadata" in known else "leave it out"
            hint = f"did you mean {near[0]!r}?" if near else aside
            raise RowError(f"{what} has the unknown key {name[:100]!r}: {hint}")


def check_text(text: str, what: str) -> None:
    """Raise ``RowError`` where ``text`` is no Unicode text: no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{what} has half a surrogate pair at character {error.start}: write the whole pair") from None
