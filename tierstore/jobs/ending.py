"""When a generated text ends: at an end token, at a stop string, or at its length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

_TOKENS_PER_CHARACTER = 4
"""A character of UTF-8 has at most four bytes, and a token is a byte at least."""

Reason = Literal["stop", "length"]
"""Why a text has ended."""

Decode = Callable[[Sequence[int]], str]
"""The text of tokens, without special ones."""


class Ending:
    """Watches one generated text. ``ends`` are the end tokens, empty where they are to be ignored."""

    def __init__(self, decode: Decode, *, ends: Collection[int], stop: Sequence[str], most: int) -> None:
        self._decode = decode
        self._ends = ends
        self._stop = stop
        self._most = most
        # Decoding the whole text for every token would take the square of its length, so only its end is looked at. A
        # first character may be broken there, and some tokenizers drop a first space: neither reaches into a stop.
        longest = max(map(len, stop), default=0)
        self._window = _TOKENS_PER_CHARACTER * (longest + 2)

    def reason(self, tokens: Sequence[int]) -> Reason | None:
        """Why a text ends with the last of ``tokens``, which did not end before; None if it goes on.

        "stop" is an end token or a stop string, also one that only the last of several tokens completes."""
        if tokens[-1] in self._ends:
            return "stop"
        if self._stop and self._stops(tokens[-self._window :]) and self._stops(tokens):
            return "stop"
        if len(tokens) < self._most:
            return None
        return "stop" if self._stop and self._stops(tokens) else "length"  # special tokens may have parted a stop

    def text(self, tokens: Sequence[int]) -> str:
        """The text of all ``tokens``, cut before the first stop string."""
        text = self._decode(tokens)
        found = [at for at in map(text.find, self._stop) if at >= 0]
        return text[: min(found)] if found else text

    def _stops(self, tokens: Sequence[int]) -> bool:
        text = self._decode(tokens)
        return any(stop in text for stop in self._stop)
