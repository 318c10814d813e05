"""Tensors that are computed when something other than the one who knows them touches them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LazyTensor(Tensor):
    """Has a shape, a dtype and a device; any operation first computes ``computed()`` and goes on with that.

    Interception is at the dispatcher, so that torch's Python code takes the same paths as with plain tensors.
    """

    __torch_function__ = cast(Any, torch._C)._disabled_torch_function_impl

    @classmethod
    def shaped(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Self:
        """One that looks like a contiguous tensor and owns no memory."""
        return cast(Self, cast(Any, Tensor)._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device))

    @abstractmethod
    def computed(self) -> Tensor:
        """The values. Computed once, then kept as long as this tensor is."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyTensor, lambda lazy: lazy.computed(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch has none here
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return cast(Any, self.computed()).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.computed().clone()

    def tolist(self) -> Any:
        """The values as numbers."""
        return self.computed().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array."""
        return self.computed().numpy(force=force)
