"""What the plan of a KV memory lets a scheduler do."""

from __future__ import annotations

from collections.abc import Sequence

from tierstore.hf.batch.slices import Capacity
from tierstore.page_plan import KindPlan


def capacity_of(plans: Sequence[KindPlan]) -> Capacity:
    """What all kinds can hold together.

    A kind with a window may have fewer pages than the others: then it bounds how many sequences there are, each with
    a page open, rather than their length, unless it has not even those of one window."""
    windows = [plan.kind.sequence_pages for plan in plans]
    bounds = [plan for plan, most in zip(plans, windows, strict=True) if most is None or plan.pages < most]
    pages = min(plan.pages for plan in bounds or plans)
    longest = None if bounds else min(max(most for most in windows if most is not None), pages)
    open_pages = min(pages, *map(_open_pages, plans))
    for plan, most in zip(plans, windows, strict=True):
        if most is not None and (plan.pages < pages or (longest is not None and longest < most)):
            open_pages = min(open_pages, max(plan.pages // most, 1))
    return Capacity(plans[0].kind.page_tokens, pages, open_pages, longest)


def _open_pages(plan: KindPlan) -> int:
    """Pages whose frames fit HBM together, beside a run of each layer that is going down, and one page to spare.

    A sequence counts for one: where its recent tokens stay unpacked, there are fewer, as it has more of them open."""
    layers, kind = len(plan.kind.layers), plan.kind
    spilling = layers * plan.run_cells if plan.ram_frames or plan.nvme_slots else 0
    frames = layers * plan.open.frames + (0 if kind.plain else 1)
    fitting = max((plan.frames - spilling) // frames - 1, kind.sequence_open_pages)
    return max(fitting // (1 + -(-kind.recent_tokens // kind.page_tokens)), 1)
