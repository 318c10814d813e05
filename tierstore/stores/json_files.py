"""JSON from files that nobody vouches for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from tierstore.errors import StoreFormatError, StoreReadError
from tierstore.stores.workers import reason_of


def read_bytes(fd: int, nbytes: int, path: Path) -> bytes:
    """Up to ``nbytes`` from where ``fd`` stands, less at the end of the file."""
    parts = bytearray()
    try:
        while len(parts) < nbytes and (part := os.read(fd, min(nbytes - len(parts), 16 << 20))):
            parts += part
    except OSError as error:
        raise StoreReadError(
            f"reading {str(path)!r} at byte {os.lseek(fd, 0, os.SEEK_CUR)}: wanted {nbytes} bytes, got {len(parts)}: "
            f"{reason_of(error)}: check the disk and the kernel log, then fetch the file again"
        ) from error
    return bytes(parts)


def strict_json(raw: bytes, what: str) -> object:
    """JSON as RFC 8259 has it, with every key once. ``StoreFormatError`` names ``what`` and the fault."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise StoreFormatError(f"{what} has the key {twice!r} twice: fetch it again")
        return table

    def no_number(text: str) -> Iterator[object]:
        raise StoreFormatError(f"{what} holds {text}, which is not JSON: fetch it again")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_number)
    except StoreFormatError:
        raise
    except UnicodeDecodeError as error:
        raise StoreFormatError(f"{what} is not UTF-8 at byte {error.start}: it is damaged: fetch it again") from error
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(f"{what} is not JSON ({str(error)[:200]}): it is damaged: fetch it again") from error


def kind_of(value: object) -> str:
    """The JSON name of what a parsed value is."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
