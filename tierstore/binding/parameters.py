"""A module's parameters as formats are chosen for them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from torch import nn

from tierstore.formats.choosing import Parameter


def parameters_of(module: nn.Module) -> list[tuple[nn.Parameter, Parameter]]:
    """Every parameter, once, with all names that it has and what kind of module holds it; those on meta too."""
    modules = dict(module.named_modules(remove_duplicate=False))
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    described = []
    for parameter, names in found.values():
        holders = {id(at): at for at in (modules[name.rpartition(".")[0]] for name in names)}
        dtype = str(parameter.dtype).removeprefix("torch.")
        kind = _kind(holders.values())
        described.append((parameter, Parameter(tuple(names), tuple(parameter.shape), dtype, kind)))
    return described


def _kind(holders: Collection[nn.Module]) -> Literal["table", "tied", "weight"]:
    tables = sum(isinstance(holder, nn.Embedding) for holder in holders)
    if not tables:
        return "weight"
    return "table" if tables == len(holders) else "tied"
