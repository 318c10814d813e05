"""What one pass is asked for, and what a scheduler must know of the pages: integers only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slice:
    """The next ``tokens`` of ``sequence``, at least one, at positions from its length on.

    Logits are wanted of the last ``logits`` of them. ``prompt`` tells a prompt's tokens, many in a row, from generated
    or drafted ones: the two are attended to in different shapes. Raises ``ValueError``.
    """

    sequence: int
    tokens: tuple[int, ...]
    logits: int
    prompt: bool

    def __post_init__(self) -> None:
        if not self.tokens or not 0 <= self.logits <= len(self.tokens):
            raise ValueError(
                f"a slice of {len(self.tokens)} tokens with {self.logits} logits: give at least one token, and ask "
                f"for the logits of 0 to all of them"
            )


@dataclass(frozen=True, slots=True)
class Capacity:
    """What pages there is room for.

    A page has ``page_tokens`` positions. ``pages`` may be held at once, by the tightest kind of layers. However long it
    is, a sequence holds ``sequence_pages`` between passes at most, where all layers have windows; None is no bound.
    ``open_pages`` can be open at once: each sequence has its last page open, and a prompt of n tokens in one pass opens
    up to ``ceil(n / page_tokens) + 1``.
    """

    page_tokens: int
    pages: int
    open_pages: int
    sequence_pages: int | None = None
