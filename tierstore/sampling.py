"""How the tokens of a row are chosen, and how many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from tierstore.errors import RowError

MOST_SAMPLES = 128
"""Sequences that one row may ask for."""
MOST_STOPS = 64
"""Stop strings of a row, each of at most ``STOP_CHARACTERS``."""
STOP_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of a row.

    ``temperature`` 0 is greedy. ``top_p`` keeps the most likely tokens up to that probability, at least one of them;
    ``top_k`` the k most likely, 0 for all; ``min_p`` those at least that many times as likely as the most likely one.
    ``seed`` None: one is derived from the job's seed and the row's line. A sequence ends before the first of the
    strings ``stop``. ``n`` sequences are generated. ``ignore_eos`` goes on after a token that ends the text."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    ignore_eos: bool = False

    @classmethod
    def checked(cls, base: Sampling | None = None, **given: Any) -> Sampling:
        """``base`` with what is ``given`` instead; None leaves that of ``base``. ``stop`` may be one string or several.

        Raises ``RowError`` for a name that is no setting, and for a value of the wrong type or range."""
        known = {}
        for name, value in given.items():
            if name not in _CHECKS:
                raise RowError(f"{name!r} is no setting: there are {', '.join(_CHECKS)}")
            if value is not None:
                known[name] = _CHECKS[name](name, value)
        base = base if base is not None else cls()
        return replace(base, **known) if known else base


def _whole(least: int, most: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise RowError(f"{name} is {_short(value)}, a whole number from {least} to {most} is needed")
        return value

    return check


def _number(least: float, most: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not least <= value <= most or not isfinite(value):
            raise RowError(f"{name} is {_short(value)}, a number from {least:g} to {most:g} is needed")
        return float(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise RowError(f"{name} is {_short(value)}, true or false is needed")
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise RowError(f"{name} is {_short(value)}, a string or a list of strings is needed")
    if len(stops) > MOST_STOPS or not all(0 < len(stop) <= STOP_CHARACTERS for stop in stops):
        raise RowError(
            f"{name} has {len(stops)} strings of {min(map(len, stops))} to {max(map(len, stops))} characters, "
            f"at most {MOST_STOPS} of 1 to {STOP_CHARACTERS} are possible"
        )
    return tuple(stops)


def _short(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"  # printing it may be refused
    return text if len(text := repr(value)) <= 60 else f"{text[:60]}..."


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": _whole(1, (1 << 31) - 1),
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _whole(0, (1 << 31) - 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _whole(0, (1 << 63) - 1),
    "stop": _stops,
    "n": _whole(1, MOST_SAMPLES),
    "ignore_eos": _flag,
}
