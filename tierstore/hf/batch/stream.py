"""The tokens of one pass as one stream, cut into micro-batches, and their queries as tiles: integers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tierstore.hf.batch.slices import Slice

PROMPT_QUERIES = 16
"""Queries of a tile of a prompt's tokens; every other token is a tile of its own."""


@dataclass(frozen=True, slots=True)
class Part:
    """``tokens`` of slice number ``slice``, from position ``position`` on, at rows from ``row`` on of a micro-batch.
    Logits of the last ``logits`` are wanted."""

    slice: int
    row: int
    position: int
    tokens: tuple[int, ...]
    logits: int
    prompt: bool


@dataclass(frozen=True, slots=True)
class Tile:
    """``count`` queries of slice number ``slice``, from position ``position`` on, at rows from ``row`` on."""

    slice: int
    row: int
    position: int
    count: int


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model in one call: ``parts`` fill its rows from the first on, the others are padding."""

    parts: tuple[Part, ...]

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The token of each row that is not padding."""
        return tuple(token for part in self.parts for token in part.tokens)

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """The position of each row that is not padding."""
        return tuple(part.position + at for part in self.parts for at in range(len(part.tokens)))

    @cached_property
    def wanted(self) -> tuple[int, ...]:
        """The rows whose logits are wanted."""
        ends = [(part, part.row + len(part.tokens)) for part in self.parts]
        return tuple(row for part, end in ends for row in range(end - part.logits, end))

    def tiles(self, queries: int) -> Iterator[Tile]:
        """The tiles of 1 query, or of up to ``PROMPT_QUERIES``."""
        for part in self.parts:
            if part.prompt == (queries > 1):
                for at in range(0, len(part.tokens), queries):
                    count = min(queries, len(part.tokens) - at)
                    yield Tile(part.slice, part.row + at, part.position + at, count)


def cut(slices: Sequence[Slice], starts: Sequence[int], size: int) -> list[MicroBatch]:
    """The tokens of ``slices``, whose sequences have ``starts`` positions until now, cut every ``size`` tokens."""
    found: list[list[Part]] = [[]]
    rows = 0
    for number, (each, start) in enumerate(zip(slices, starts, strict=True)):
        at = 0
        while at < len(each.tokens):
            if rows == size:
                found.append([])
                rows = 0
            tokens = each.tokens[at : at + size - rows]
            logits = max(at + len(tokens) - max(len(each.tokens) - each.logits, at), 0)
            found[-1].append(Part(number, rows, start + at, tokens, logits, each.prompt))
            rows += len(tokens)
            at += len(tokens)
    return [MicroBatch(tuple(parts)) for parts in found]
