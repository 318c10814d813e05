"""Which blocks are fetched together: units, cut along the module tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Group:
    """Blocks that one turn needs. ``turns`` are the modules whose forward is that turn; none when no
    forward covers the blocks' uses, so that each operation asks for them by itself."""

    name: str
    blocks: tuple[str, ...]
    turns: tuple[nn.Module, ...]


def group_blocks(
    root: nn.Module,
    owners: Mapping[str, Iterable[nn.Module]],
    nbytes: Mapping[str, int],
    *,
    limit_nbytes: int,
    leaf_limit_nbytes: int,
    looked_up: Iterable[str] = (),
) -> list[Group]:
    """Cut ``root`` into the largest subtrees of at most ``limit_nbytes``, in registration order; a module
    without children may have up to ``leaf_limit_nbytes``.

    ``owners`` gives, per block, the modules that hold it directly, first owner first. A module above
    the limit that has children is cut further, and what it holds itself stands alone, block by block:
    its forward spans its children's, so its own weights must not stay for that long. Blocks in
    ``looked_up`` (embedding tables) stand alone, with no turn: their operation takes rows.
    """
    direct: dict[nn.Module, list[str]] = {}
    for block, holders in owners.items():
        direct.setdefault(next(iter(holders)), []).append(block)
    alone = set(looked_up)
    names = {module: name for name, module in root.named_modules()}
    groups: list[Group] = []
    seen: set[nn.Module] = set()

    def add_alone(block: str) -> None:
        served = _leaves_of([block], owners)
        turns = [m for m in served if not (block in alone and isinstance(m, nn.Embedding))]
        groups.append(Group(block, (block,), tuple(turns) if nbytes[block] <= leaf_limit_nbytes else ()))

    def visit(module: nn.Module) -> None:
        if module in seen:
            return
        subtree = [m for m in module.modules() if m not in seen]
        blocks = [b for m in subtree for b in direct.get(m, ())]
        if not blocks:
            return
        together = [b for b in blocks if b not in alone]
        if (
            sum(nbytes[b] for b in together) <= limit_nbytes
            and len(together) == len(blocks)
            and (_is_called(module) or len(subtree) == 1)
        ):
            seen.update(subtree)
            groups.append(Group(names[module] or "(root)", tuple(blocks), _turns(module, subtree, blocks, owners)))
            return
        seen.add(module)
        own = direct.get(module, [])
        leaf = len(subtree) == 1
        if leaf and own and not alone.intersection(own) and sum(nbytes[b] for b in own) <= leaf_limit_nbytes:
            groups.append(Group(names[module] or "(root)", tuple(own), _turns(module, subtree, own, owners)))
        else:
            for block in own:
                add_alone(block)
        for child in module.children():
            visit(child)

    visit(root)
    return groups


def _is_called(module: nn.Module) -> bool:
    """Whether the module has a forward of its own (lists and dicts of modules have none)."""
    return type(module).forward is not nn.Module.forward


def _turns(
    module: nn.Module, subtree: list[nn.Module], blocks: Iterable[str], owners: Mapping[str, Iterable[nn.Module]]
) -> tuple[nn.Module, ...]:
    """The module itself, and childless modules elsewhere that hold all their blocks here (tied weights)."""
    inside = set(subtree)
    return (module, *(m for m in _leaves_of(blocks, owners) if m not in inside))


def _leaves_of(blocks: Iterable[str], owners: Mapping[str, Iterable[nn.Module]]) -> list[nn.Module]:
    """The childless modules that hold blocks of ``blocks`` and no others."""
    held = set(blocks)
    holders = dict.fromkeys(m for block in blocks for m in owners[block])
    childless = [m for m in holders if not any(True for _ in m.children())]
    return [m for m in childless if {b for b, ms in owners.items() if m in set(ms)} <= held]
