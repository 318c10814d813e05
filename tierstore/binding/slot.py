"""A unit's bytes in memory, seen as tensors; and who else still sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.utils.dlpack import from_dlpack


class Slot:
    """The memory of one lease as tensors over a storage of its own.

    A storage of its own, because its use count then tells whether a view of the slot escaped.
    ``offsets`` are the byte offsets of the blocks within the lease.
    """

    __slots__ = ("key", "offsets", "storage")

    def __init__(self, memory: torch.Tensor, offsets: Mapping[str, int]) -> None:
        self.storage = _again(memory).untyped_storage()
        self.offsets = offsets
        self.key: int = self.storage._cdata

    def tensor(self, block: str, like: torch.Tensor) -> torch.Tensor:
        """A view of ``block`` with the dtype, shape, strides and offset of the meta tensor ``like``."""
        offset = self.offsets[block] // like.itemsize + like.storage_offset()
        empty = torch.empty(0, dtype=like.dtype, device=self.storage.device)
        tensor = empty.set_(cast(Any, self.storage), offset, like.size(), like.stride())
        if like.is_conj():
            tensor = tensor.conj()
        return cast(Any, torch)._neg_view(tensor) if like.is_neg() else tensor

    def apart(self, block: str, nbytes: int) -> torch.UntypedStorage:
        """A storage of only ``block``, which has ``nbytes``: for tensors that stay in the slot for good."""
        return _again(self.block_bytes(block, nbytes)).untyped_storage()

    def block_bytes(self, block: str, nbytes: int) -> torch.Tensor:
        """The bytes of ``block``: 1-D uint8."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return empty.set_(cast(Any, self.storage), self.offsets[block], (nbytes,), (1,))

    def users(self) -> int:
        """How many tensors, in Python or inside torch, share the storage now."""
        return storage_users(self.storage)


def _again(memory: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor with a storage of its own, also when its device is not the current one."""
    return from_dlpack(cast(Any, torch).to_dlpack(memory))


def storage_users(storage: torch.UntypedStorage) -> int:
    """Owners of a storage: tensors, in Python or saved inside torch, and storage objects."""
    return int(cast(Any, torch._C)._storage_Use_Count(storage._cdata))
