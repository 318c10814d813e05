"""How layers with a window and layers without one share the bytes of a KV budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from tierstore.page_kinds import PageKind

_NO_WINDOW_TOKENS = 1 << 20


def page_shares(kinds: Sequence[PageKind], nbytes: int) -> list[int]:
    """Bytes that each kind fills with one sequence, as long as fits ``nbytes`` or as ``_sequence_tokens`` says.

    Only their proportions matter: the tiers, which have ``nbytes`` together, are divided by them.
    """

    def filled(tokens: int) -> list[int]:
        return [kind.page_nbytes * min(-(-tokens // kind.page_tokens), kind.sequence_pages or tokens) for kind in kinds]

    lengths = range(1, _sequence_tokens(kinds) + 1)
    fitting = bisect_right(lengths, nbytes, key=lambda tokens: sum(filled(tokens)))
    return filled(max(fitting, 1))


def _sequence_tokens(kinds: Sequence[PageKind]) -> int:
    """The longest sequence that shares are made for.

    Long sequences want all memory for the kinds without a window, short ones want equal pages for every kind.
    This length holds at least half of what the best shares would hold, whatever the length in truth: with ``a`` bytes
    a token in kinds with a window and ``b`` in the others, windows times ``(a + b) / b`` makes the loss at both ends
    equal, ``a / (2 * a + b)``.
    """
    windows = [kind.sequence_pages * kind.page_tokens for kind in kinds if kind.sequence_pages is not None]
    if not windows:
        return _NO_WINDOW_TOKENS
    rates = [kind.page_nbytes / kind.page_tokens for kind in kinds]
    endless = sum(rate for kind, rate in zip(kinds, rates, strict=True) if kind.window is None)
    return int(max(windows) * sum(rates) / endless) if endless else max(windows)
