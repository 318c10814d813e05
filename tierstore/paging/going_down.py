"""Which cells leave HBM: those that closed last, in runs, from the layers that have most. Numbers in, moves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierstore.page_plan import KindPlan


@dataclass(frozen=True, slots=True)
class Descent:
    """The last ``count`` standing cells of ``layer`` go down."""

    layer: int
    count: int


def quota_now(plan: KindPlan, open_pages: int) -> int:
    """Closed cells a layer that may stay in HBM while ``open_pages`` are open: more than the plan's quota while few
    are, with room for one more, and fewer while more are than it was made for."""
    spare, missing = plan.open_pages - open_pages - 1, open_pages - plan.open_pages
    return max(0, plan.quota + (max(spare, 0) - max(missing, 0)) * plan.open.frames)


def run_is_full(plan: KindPlan, open_pages: int, standing: int) -> bool:
    """Whether a layer with ``standing`` cells in HBM has a whole run beyond its quota."""
    return standing >= quota_now(plan, open_pages) + plan.run_cells


def make_room(standing: Sequence[int], run_cells: int, frames: int) -> list[Descent]:
    """Descents that free ``frames`` frames or all there are, given the ``standing`` cells of each layer.

    Whole runs wherever a layer has one; the layer that has most gives next, so that all keep about the same."""
    left = list(standing)
    descents: list[Descent] = []
    while frames > 0 and (most := max(left, default=0)):
        layer = left.index(most)
        descents.append(Descent(layer, min(run_cells, most)))
        left[layer] -= descents[-1].count
        frames -= descents[-1].count
    return descents
