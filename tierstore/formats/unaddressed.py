"""What Python asks of a tensor past the dispatcher, where its values have no address: copies, or an error."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierstore.errors import ModuleError


class Unaddressed:
    """Beside ``Tensor`` among the bases of a class whose tensors have no memory of their own."""

    @abstractmethod
    def _copied(self, *, attached: bool = False) -> Tensor:
        """A plain copy of the values; ``attached`` to the autograd graph if the tensor is."""

    @abstractmethod
    def _no_address(self, what: str) -> ModuleError:
        """The error for ``what`` needs an address."""

    def tolist(self) -> Any:
        return self._copied().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only copy: writes through numpy could not be seen."""
        array = self._copied(attached=True).numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.numpy(), dtype=dtype)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._copied().__dlpack__(*args, **kwargs)

    def data_ptr(self) -> int:
        raise self._no_address("data_ptr()")

    def untyped_storage(self) -> torch.UntypedStorage:
        raise self._no_address("untyped_storage()")

    def storage(self) -> Any:
        raise self._no_address("storage()")

    def share_memory_(self) -> Any:
        raise self._no_address("share_memory_()")
