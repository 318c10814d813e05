"""From a module's tensors to units and a plan: what ``offload`` and ``load`` have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tierstore.binding.binder import Held
from tierstore.binding.grouping import Group, group_blocks
from tierstore.binding.loans import LOOKED_UP_FROM
from tierstore.budget import Budget, Tier, format_nbytes
from tierstore.errors import PlanError
from tierstore.plan import Plan, build_plan
from tierstore.simulate import Links
from tierstore.tensors import Unit

UNIT_NBYTES = 64 << 20
"""Subtrees are fetched whole up to this size: larger units only make the ring larger."""

TYPICAL_LINKS = Links(nvme_bytes_per_second=2e9, ram_bytes_per_second=2e10, latency_seconds=1e-4)
"""What the planner assumes where nothing was measured yet; only ring sizes depend on it."""

TYPICAL_COMPUTE = 1e10
"""Weight bytes per second of a memory-bound pass, where nothing was measured yet."""

TIGHT = 3
"""Below this many times the largest operation's weights, no weight stays: all memory streams."""


@dataclass(frozen=True)
class Cut:
    """A module cut into units: the groups and their order of use. One operation needs ``least_nbytes`` at once,
    may need ``step_nbytes`` of more than one unit, and may need ``table_nbytes`` of what is only looked up."""

    groups: tuple[Group, ...]
    order: tuple[str, ...]
    least_nbytes: int
    step_nbytes: int
    table_nbytes: int


def cut_module(root: nn.Module, held: Sequence[Held], nbytes: Mapping[str, int], hbm: int) -> Cut:
    """Units for the blocks of ``held`` (``nbytes`` each) when ``hbm`` bytes may stand in memory."""
    owners: dict[str, dict[nn.Module, None]] = {}
    for item in held:
        for location in item.entry.locations:
            owners.setdefault(item.block, {})[location.owner] = None
    looked_up = {
        item.block
        for item in held
        if nbytes[item.block] >= LOOKED_UP_FROM
        and item.meta.dim() == 2  # other parts of a packed table have no rows
        and any(type(location.owner) is nn.Embedding for location in item.entry.locations)
    }
    groups = group_blocks(
        root,
        owners,
        nbytes,
        limit_nbytes=min(UNIT_NBYTES, hbm // 8),
        leaf_limit_nbytes=hbm // 2,
        looked_up=looked_up,
    )
    whole = _whole_nbytes(held, nbytes)
    return Cut(
        tuple(groups),
        _order_of(root, groups, owners, looked_up),
        _least_nbytes(owners, nbytes, whole),
        _step_nbytes(root, groups, owners, nbytes, looked_up),
        max((whole[block] for block in looked_up), default=0),
    )


def plan_units(
    units: Sequence[Unit],
    cut: Cut,
    hbm: int,
    ram: int,
    *,
    fixed_nbytes: int,
    unified: bool,
    look_up: bool,
    links: Links = TYPICAL_LINKS,
    compute_bytes_per_second: float = TYPICAL_COMPUTE,
) -> Plan:
    """A plan for ``units`` in ``hbm`` bytes, beside ``fixed_nbytes`` that stay for other reasons.

    ``compute_bytes_per_second`` are weight bytes that one token's pass computes with in a second.
    With ``look_up``, tables that the order leaves out rest on disk, where their rows are read, unless
    everything fits in memory.

    Raises ``PlanError`` with the smallest ``hbm`` that would do.
    """
    largest = cut.least_nbytes
    if hbm < fixed_nbytes + largest:
        beside = f" beside {format_nbytes(fixed_nbytes)} of tensors that stay in memory" if fixed_nbytes else ""
        raise PlanError(
            f"an operation needs {format_nbytes(largest)} of weights in hbm at once{beside}, the budget has "
            f"{format_nbytes(hbm)}: raise Budget.hbm to at least {format_nbytes(fixed_nbytes + largest)} "
            f"({fixed_nbytes + largest} bytes)",
            needed=fixed_nbytes + largest,
        )
    room = hbm - fixed_nbytes
    used = set(cut.order)
    tables = [unit.name for unit in units if unit.name not in used]
    fits = sum(unit.nbytes for unit in units) <= room + (ram if unified else 0)
    at_rest = dict.fromkeys(tables, Tier.NVME) if look_up and not fits else {}

    # where little fits, all of it streams: an operation that needs several units then always finds room
    step = room if room < TIGHT * max(largest, cut.step_nbytes) else cut.step_nbytes

    table = cut.table_nbytes if at_rest else 0

    def planned(left_out: Mapping[str, Tier], bound: int) -> Plan:
        return build_plan(
            [unit for unit in units if unit.name not in left_out],
            cut.order if left_out else (*tables, *cut.order),
            Budget(max(bound, 1), ram),
            links=links,
            compute_seconds={unit.name: unit.nbytes / compute_bytes_per_second for unit in units},
            unified=unified,
            largest_step_nbytes=min(bound, max(step, table)),
        )

    # whoever needs a whole table must find room for it, in the ring that is no larger than what streams in a pass
    rest = [unit.nbytes for unit in units if unit.name not in at_rest]
    plan: Plan | None = None
    if at_rest:
        with suppress(PlanError):
            plan = planned(at_rest, room if sum(rest) >= table else max([room - table, *rest]))
    if plan is None or room - plan.resident_nbytes[Tier.HBM] < table:
        try:
            return planned({}, room)
        except PlanError as error:
            beside = f" (beside {format_nbytes(fixed_nbytes)} of tensors that stay)" if fixed_nbytes else ""
            raise PlanError(f"{error}{beside}", needed=fixed_nbytes + error.needed) from error
    ring = min(max(plan.ring_nbytes, table), room - plan.resident_nbytes[Tier.HBM])
    return replace(plan, tier={**plan.tier, **at_rest}, ring_nbytes=ring)


def align_of(tensors: Sequence[Tensor]) -> int:
    """The address alignment that keeps results bit-equal to those of fresh tensors.

    16-bit floats give the same bits at any address of theirs (measured on x86 with torch 2.13); the
    last bit of float32 and float64 products depends on it, and torch aligns fresh memory to 64.
    """
    return 2 if all(t.dtype in (torch.bfloat16, torch.float16) for t in tensors) else 64


def _order_of(
    root: nn.Module, groups: Sequence[Group], owners: Mapping[str, Mapping[nn.Module, None]], looked_up: set[str]
) -> tuple[str, ...]:
    """Units in registration order of the modules that use them; tables that are only looked up are left out."""
    uses: dict[nn.Module, list[str]] = {}
    for group in groups:
        if group.turns:
            for module in group.turns:
                uses.setdefault(module, []).append(group.name)
        elif not looked_up.intersection(group.blocks):
            uses.setdefault(next(iter(owners[group.blocks[0]])), []).append(group.name)
    return tuple(name for module in root.modules() for name in uses.get(module, ()))


def _whole_nbytes(held: Sequence[Held], nbytes: Mapping[str, int]) -> dict[str, int]:
    """For each block, the bytes of its tensor with all its parts."""
    sums: dict[str, int] = {}
    for item in held:
        sums[item.entry.part_of] = sums.get(item.entry.part_of, 0) + nbytes[item.block]
    return {item.block: sums[item.entry.part_of] if item.entry.part_of else nbytes[item.block] for item in held}


def _least_nbytes(
    owners: Mapping[str, Mapping[nn.Module, None]], nbytes: Mapping[str, int], whole: Mapping[str, int]
) -> int:
    """What some operation surely needs at once: a tensor with all its parts, or the weight and bias of one product."""
    held: dict[nn.Module, int] = {}
    for block, holders in owners.items():
        for module in holders:
            if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
                held[module] = held.get(module, 0) + nbytes[block]
    return max([*whole.values(), *held.values()], default=0)


def _step_nbytes(
    root: nn.Module,
    groups: Sequence[Group],
    owners: Mapping[str, Mapping[nn.Module, None]],
    nbytes: Mapping[str, int],
    looked_up: set[str],
) -> int:
    """An upper bound of what one operation needs of more than one unit: the tensors of a module, or all of those
    that torch fuses. 0 when every operation needs one unit. Of a table that is looked up it needs rows."""
    unit_of = {block: group for group in groups for block in group.blocks}
    used: dict[nn.Module, set[str]] = {}
    for block, holders in owners.items():
        for module in holders:
            if not (block in looked_up and type(module) is nn.Embedding):
                used.setdefault(module, set()).add(unit_of[block].name)
    sizes = {group.name: sum(nbytes[block] for block in group.blocks) for group in groups}
    fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    largest = 0
    for module in root.modules():
        parts = module.modules() if isinstance(module, fused) else [module]
        step = set[str]().union(*(used.get(part, set()) for part in parts))
        if len(step) > 1:
            largest = max(largest, sum(sizes[name] for name in step))
    return largest
