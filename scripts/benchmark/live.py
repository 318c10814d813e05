"""How many bytes of tensors live at once while something runs, by watching every operation of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's part of it
    """``peak`` is the most bytes that memory made inside the ``with`` ever had, seen after each operation, when its
    inputs still live.

    What ``apart()`` gives, such as a cache's tensors, is not counted while it does. What was there before is not
    either. What an operation takes and gives back within itself, such as buffers of a matrix product, is not seen.
    """

    def __init__(self, apart: Callable[[], Iterable[Tensor]] = lambda: ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._apart = apart
        self._live: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(map(_intercepts, types)):
            return NotImplemented  # it works with plain tensors in the end, and these are seen
        result = func(*args, **(kwargs or {}))
        there = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in there and key not in self._live:
                storage = tensor.untyped_storage()
                self._live[key] = (cast(Any, StorageWeakRef)(storage), storage.nbytes())
        apart = {_key(tensor) for tensor in self._apart()}
        self.peak = max(self.peak, sum(size for key, (_, size) in self._live.items() if key not in apart))
        return result


def _intercepts(kind: type) -> bool:
    """Whether tensors of a class see operations themselves."""
    return any("__torch_dispatch__" in vars(base) for base in kind.__mro__[: kind.__mro__.index(Tensor)])


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
