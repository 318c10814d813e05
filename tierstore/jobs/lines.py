"""Lines of a file that may be long, many or hostile, a block at a time; and a JSON object in a line, read strictly."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_LINE_NBYTES = 64 << 20
"""A longer line is not held in memory, and not read as anything."""
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """``number`` from 1; ``offset`` of its first byte in the file. ``raw`` is without the newline that ended it, None
    where it is longer than ``MAX_LINE_NBYTES``. ``whole`` is False where the file ends without a newline."""

    number: int
    offset: int
    raw: bytes | None
    whole: bool


def lines_of(fd: int, nbytes: int, *, seen: Callable[[bytes], object] | None = None) -> Iterator[Line]:
    """The lines in the first ``nbytes`` bytes of a file; ``seen`` gets each block as it is read. Raises ``OSError``."""
    number, offset, at, rest, too_long = 1, 0, 0, bytearray(), False
    while at < nbytes and (block := os.pread(fd, min(_BLOCK, nbytes - at), at)):
        if seen is not None:
            seen(block)
        first, *others = block.split(b"\n")
        rest += first
        for part in others:
            raw = None if too_long or len(rest) > MAX_LINE_NBYTES else bytes(rest)
            end = at + block.find(b"\n", max(0, offset - at)) + 1
            yield Line(number, offset, raw, True)
            number, offset, rest, too_long = number + 1, end, bytearray(part), False
        if len(rest) > MAX_LINE_NBYTES:
            rest, too_long = bytearray(), True
        at += len(block)
    if offset < at:
        yield Line(number, offset, None if too_long else bytes(rest), False)


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259) in UTF-8, each key once. Raises ``ValueError`` saying what is wrong."""
    try:
        value = _decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}: save the file as UTF-8") from None
    except RecursionError:
        raise ValueError("arrays or objects in it are nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at character {error.pos}: {error.msg}") from None
    except _FaultError:
        raise
    except ValueError:  # Python's limit on digits
        raise ValueError("a whole number in it has too many digits") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {kind_of(value)}, an object is needed")
    return value


def kind_of(value: object) -> str:
    """The JSON name of what a parsed value is."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


class _FaultError(ValueError):
    """Said by the two functions below."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _FaultError(f"the key {twice[:100]!r} is in it twice")
    return table


def _no_constant(text: str) -> None:
    raise _FaultError(f"{text} in it is no JSON number")


_decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant).decode
