"""Stands for a model's ``generate`` on one instance, and leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import update_wrapper
from types import MethodType
from typing import Any

from torch import nn


class StandIn:
    """``through(generate, *args, **kwargs)`` is called in place of ``module.generate``, until ``close``. A copy of the
    module has its own ``generate`` again."""

    def __init__(self, module: nn.Module, through: Callable[..., Any]) -> None:
        self._module, self._through = module, through
        self._own = module.__dict__.get("generate")
        self._call: Callable[..., Any] = module.generate  # type: ignore[assignment]  # checked by who made the cache
        update_wrapper(self, self._call)
        module.__dict__["generate"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._through(self._call, *args, **kwargs)

    def close(self) -> None:
        """Leave the module as it was found, unless another stands for it by now. Idempotent."""
        if self._module.__dict__.get("generate") is not self:
            return
        if self._own is None:
            del self._module.__dict__["generate"]
        else:
            self._module.__dict__["generate"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        copied: Any = memo.get(id(self._module))
        return MethodType(type(copied).generate, copied)

    def __reduce__(self) -> Any:
        return (getattr, (self._module, "generate")) if self._own is None else self._own.__reduce__()
