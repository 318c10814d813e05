"""How large ``kv_hbm`` must be for pages that a plan has no room for: so that an error names a number that works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierstore.errors import PlanError
from tierstore.page_plan import SECTOR, KindPlan, PageKind, build_page_plan

__all__ = ["PageNeed", "advice", "enough_hbm", "has_room"]

_MOST = 1 << 50
"""Bytes that no device has."""


@dataclass(frozen=True, slots=True)
class PageNeed:
    """``rows`` sequences of up to ``tokens`` tokens, which grow side by side and share nothing.

    ``whole``: pages behind a window are kept too. ``beside``: of each kind, pages that others hold, open ones perhaps.
    ``at_once`` tokens of each come in one pass, which cannot be several, so that their pages are all open.
    """

    rows: int
    tokens: int
    whole: bool = False
    beside: tuple[int, ...] = ()
    at_once: int = 0


def advice(kv_hbm: int, rows: int, tokens: int) -> str:
    """The end of an error: which ``kv_hbm`` is enough for ``rows`` sequences of up to ``tokens`` tokens."""
    sequences = "1 sequence" if rows == 1 else f"{rows} sequences"
    return f"; raise Budget.kv_hbm to {kv_hbm} bytes for {sequences} of up to {tokens} tokens"


def has_room(plan: KindPlan, need: PageNeed, beside: int = 0, *, below: bool = True) -> bool:
    """Whether ``plan`` has room for ``need``, beside pages that others hold; without ``below`` all of it in HBM."""
    kind, layers = plan.kind, len(plan.kind.layers)
    full = -(-need.tokens // kind.page_tokens)
    each = full if need.whole or kind.sequence_pages is None else min(full, kind.sequence_pages)
    # a prompt opens what may be open at once, in one pass
    opened = max(need.rows * min(full, kind.sequence_open_pages), min(plan.open_pages, need.rows * full))
    pages = min(need.rows * full, need.rows * each + opened) + beside
    opened = min(opened + beside, pages)
    room = (plan.ram_frames // layers + _pages_on_disk(plan)) if below else 0
    going_down = layers * plan.run_cells if plan.ram_frames or plan.nvme_slots else 0
    if need.at_once and need.rows * -(-need.at_once // kind.page_tokens) + beside > plan.open_pages:
        return False
    frames = layers * (opened * plan.open.frames + max(pages - opened - room, 0)) + (0 if kind.plain else opened)
    return pages <= plan.pages and frames + going_down <= plan.frames


def enough_hbm(
    kinds: Sequence[PageKind], need: PageNeed, kv_ram: int, kv_nvme: int, *, unified: bool, above: int = 0
) -> int | None:
    """A ``kv_hbm`` of more than ``above`` bytes, about the smallest, with which there is room for ``need``; None where
    no number helps. What was to have room with ``above`` and had none gets it in HBM alone: then the disk failed."""

    def fits(kv_hbm: int, below: bool = True) -> bool:
        try:
            plans = build_page_plan(kinds, kv_hbm, kv_ram, kv_nvme, unified=unified).kinds
        except PlanError:
            return False
        beside = need.beside or (0,) * len(plans)
        return all(has_room(plan, need, more, below=below) for plan, more in zip(plans, beside, strict=True))

    below = not fits(above)
    low, high = above, max(2 * above, 1 << 16)
    while not fits(high, below):
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > max(high // 256, 1):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle, below) else (middle, high)
    return high


def _pages_on_disk(plan: KindPlan) -> int:
    """Pages that have room on disk when no cell's neighbours live: each cell then takes all blocks that it touches."""
    touched = -(-plan.frame_nbytes // SECTOR) + (1 if plan.frame_nbytes % SECTOR else 0)
    return min(plan.nvme_slots, plan.nvme_nbytes // SECTOR // touched) // len(plan.kind.layers)
