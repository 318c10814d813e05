"""Stops ``module.to(dtype)`` and the like, which would give an offloaded module other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from tierstore.binding.views import Ghost
from tierstore.errors import ModuleError
from tierstore.formats.packed_views import Packed


class Conversions:
    """While watched, ``half()``, ``to(...)``, ``cuda()`` and all that goes through ``nn.Module._apply`` either
    change no offloaded tensor or raise ``ModuleError`` before they changed anything."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Watch ``modules``: those that hold offloaded tensors."""
        for module in modules:
            if "_apply" not in module.__dict__:
                module.__dict__["_apply"] = _Checked(module)
                self._modules.append(module)

    def unwatch(self) -> None:
        """Idempotent."""
        while self._modules:
            self._modules.pop().__dict__.pop("_apply", None)


class _Checked:
    """Stands before the ``_apply`` of one module; a copy of the module has its own again."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = self._module
        tensors = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
        packed = any(isinstance(tensor, Packed) for _, tensor in tensors)
        for name, tensor in tensors:
            with torch.no_grad():
                changes = (packed or isinstance(tensor, Ghost)) and fn(tensor) is not tensor
            if changes:
                raise ModuleError(
                    f"{name} is offloaded or beside packed weights and cannot be converted, moved or emptied now: "
                    f"close the session, convert the module, and offload it again"
                )
        if packed:  # torch would give each of them another __dict__
            return module
        converted: nn.Module = cast(Any, type(module))._apply(module, fn, recurse)
        return converted

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module))
        return MethodType(type(copied)._apply, copied) if isinstance(copied, nn.Module) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._module, "_apply"))
