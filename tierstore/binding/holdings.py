"""Which storages the calls of a module hold, each for itself, while they are within it.

Seen are floating tensors that go into the forward of a module and that come out of it, so what a decoder's layer keeps
for later is among them: what it adds to, and what it multiplies with. Each is known by a weak reference to its storage,
whatever views of it there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef

_CONTAINERS = (tuple, list, dict)
_HOLDING = {Tensor, *_CONTAINERS}


class Holdings:
    """What ``call`` holds, of ``least_nbytes`` or more on ``device``. ``owners`` is common to all calls: whose each
    known storage is, by its number. ``recall`` is told whose storages somebody else is about to look at.

    Left out is what may be somebody else's: parameters, what stands in an attribute of a module that the call came
    through, what is part of larger memory or of memory that torch does not own, what another call holds too, and what
    the call was given. So is what has a gradient.
    """

    def __init__(
        self,
        call: int,
        device: torch.device,
        least_nbytes: int,
        owners: dict[int, Holdings | None],
        recall: Callable[[int], None],
    ) -> None:
        self.call = call
        self._device, self._least, self._owners, self._recall = device, least_nbytes, owners, recall
        self._known: dict[int, StorageWeakRef] = {}
        self._foreign: list[StorageWeakRef] = []  # so that no other storage gets the number of one of these
        self._within: list[nn.Module] = []
        self._entered: list[nn.Module] = []

    def through(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` of ``module`` gives, whose tensors are noted."""
        note = self._note if self._within else self._leave_alone
        note(args)
        note(kwargs)
        self._within.append(module)
        self._entered.append(module)
        try:
            result = forward(*args, **kwargs)
        finally:
            self._within.pop()
        self._note(result)
        return result

    def storages(self) -> list[UntypedStorage]:
        """Those that are alive now, and that nobody else may look at until the call goes on."""
        for module in dict.fromkeys([*self._within, *self._entered]):
            self._leave_alone([each for each in module.__dict__.values() if type(each) in _HOLDING])
        self._entered.clear()
        found = []
        for number, ref in list(self._known.items()):
            storage: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                self._forget(number)
            elif self._owners[number] is self:
                found.append(storage)
        return found

    def _note(self, value: Any) -> None:
        for tensor in _tensors(value):
            if not tensor.is_floating_point() or tensor.device != self._device:
                continue
            storage = tensor.untyped_storage()
            number, nbytes = storage._cdata, storage.nbytes()
            if number in self._owners:
                if self._owners[number] is not self:
                    self._leave_alone(tensor)  # two calls have it
            elif (
                nbytes == tensor.numel() * tensor.element_size() >= self._least
                and storage.resizable()
                and not tensor.requires_grad
            ):
                self._known[number] = _weak(storage)
                self._owners[number] = self

    def _leave_alone(self, value: Any) -> None:
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            number = storage._cdata
            if number not in self._owners:
                self._foreign.append(_weak(storage))
            owner, self._owners[number] = self._owners.get(number), None
            if owner is not None and owner is not self:
                self._recall(owner.call)

    def _forget(self, number: int) -> None:
        del self._known[number]
        del self._owners[number]


def _weak(storage: UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _tensors(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """Plain tensors in ``value``, and in containers in it."""
    if type(value) is Tensor or type(value) is nn.Parameter:
        if value.layout is torch.strided:
            yield value
    elif depth and isinstance(value, _CONTAINERS):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each, depth - 1)
