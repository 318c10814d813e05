"""What an operation of torch's dispatcher does with its arguments, for tensor subclasses that carry it out."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
"""The key of operations that are made of others."""

_STATISTICS = ("running_mean", "running_var")


class Signature:
    """What an operation's schema says about aliasing: ``may_view`` where a result may be a view of an argument."""

    __slots__ = ("_keywords", "_positions", "may_view")

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.may_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        self._positions: list[int] = []
        self._keywords: list[str] = []
        for position, argument in enumerate(schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            # torch's schemas do not say that batch_norm and instance_norm write their statistics
            if written or argument.name in _STATISTICS:
                self._positions.append(position)
                self._keywords.append(argument.name)

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments that the operation writes to."""
        if not self._positions:
            return []
        positional = [args[position] for position in self._positions if position < len(args)]
        return positional + [kwargs[keyword] for keyword in self._keywords if keyword in kwargs]


@lru_cache(maxsize=4096)
def signature_of(func: Any) -> Signature:
    """Looked up once per operation."""
    return Signature(func)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Arguments or results, however nested, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        items = [map_tensors(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value
