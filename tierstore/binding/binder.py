"""Takes a module's tensors out of memory and puts them back, leaving the module as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from tierstore.binding.conversion import Conversions
from tierstore.binding.ghosts import GhostParameter, GhostTensor
from tierstore.binding.grouping import Group
from tierstore.binding.inventory import Entry
from tierstore.binding.loans import Loans
from tierstore.binding.slot import Slot, storage_users
from tierstore.binding.swap import become, can_swap
from tierstore.binding.turns import Seat, Turn
from tierstore.binding.views import View, view_of
from tierstore.errors import SessionClosedError


@dataclass(frozen=True)
class Held:
    """An offloaded tensor: the entry, the block it lies in, its view of that block on meta, its own device."""

    entry: Entry
    block: str
    meta: Tensor
    device: torch.device


class Binder:
    """Ghosts in the places of a module's tensors, and the turns of its units.

    Built in two steps, so that a failure in between leaves the module untouched: the constructor
    only looks, ``bind`` changes the module, ``unbind`` changes it back.
    """

    def __init__(self, held: Sequence[Held], groups: Sequence[Group], loans: Loans, device: torch.device) -> None:
        self._held = list(held)
        self.loans = loans
        self._device = device
        self._groups = list(groups)
        self._turns: dict[str, Turn] = {}
        self.settled: set[str] = set()
        """Units that are in memory for good."""
        self._settled: dict[int, int] = {}  # by entry: the storage that its tensor was given for good
        self._originals: dict[int, Tensor] = {}
        self._conversions = Conversions()

    def bind(self) -> None:
        """Put the ghosts in. Memory of the tensors is freed unless somebody else holds it."""
        seats: dict[str, list[Seat]] = {}
        for item in self._held:
            tensor = item.entry.tensor
            view = View(self.loans, item.block, item.meta, self._device)
            self._originals[id(item.entry)] = become_ghost(tensor, view)
            seats.setdefault(self.loans.unit_of(item.block), []).append(Seat(tensor, view, tuple(item.entry.locations)))
        for group in self._groups:
            if group.turns:
                turn = self._turns[group.name] = Turn(group.name, seats[group.name], self.loans)
                turn.watch(group.turns)
        self.loans.step_aside = self._step_aside
        self._conversions.watch(location.owner for item in self._held for location in item.entry.locations)
        self._forget_originals()

    def settle(self, units: Iterable[str], slots: Callable[[str], Slot]) -> None:
        """Give the tensors of resident units their memory for good: no ghosts, no turns."""
        chosen = set(units)
        self.settled |= chosen
        for name in chosen:
            if name in self._turns:
                self._turns.pop(name).unwatch()
        made: dict[str, Slot] = {}
        blocks: dict[str, torch.UntypedStorage] = {}
        for item in self._held:
            unit = self.loans.unit_of(item.block)
            tensor = item.entry.tensor
            if unit in chosen and can_swap(tensor):
                slot = made.get(unit) or made.setdefault(unit, slots(unit))
                storage = blocks.get(item.block)
                if storage is None:
                    nbytes = item.meta.untyped_storage().nbytes()
                    storage = blocks[item.block] = slot.apart(item.block, nbytes)
                become_real(tensor, view_like(item.meta, storage))
                self._settled[id(item.entry)] = storage._cdata

    def stations(self, root: nn.Module) -> dict[nn.Module, str]:
        """The modules whose forward uses a unit that may have to be fetched, each with that unit, in order of use.

        Those without a turn are childless, and of several units of theirs it is the first. Tables whose rows are
        looked up are not among them."""
        found: dict[nn.Module, str] = {}
        for turn in self._turns.values():
            found.update(dict.fromkeys(turn.modules, turn.unit))
        without = {group.name for group in self._groups if not group.turns} - self.settled
        for item in self._held:
            unit = self.loans.unit_of(item.block)
            if unit in without:
                for owner in (location.owner for location in item.entry.locations):
                    table = isinstance(owner, nn.Embedding) and self.loans.has_rows(item.block)
                    if not table and not any(True for _ in owner.children()):
                        found.setdefault(owner, unit)
        return {module: found[module] for module in root.modules() if module in found}

    def unbind(self, restore: Callable[[Held], Tensor]) -> None:
        """Put real tensors back: ``restore`` gives each one's memory, on its original device."""
        self._stop()
        failed: Exception | None = None
        for item in self._held:
            original = self._originals.pop(id(item.entry), None)
            try:
                memory = self._rebound(item)
                if memory is None:
                    memory = restore(item)
                    if original is not None:
                        memory = _written_to(original, memory)
                become_real(item.entry.tensor, memory)
            except Exception as error:  # the other tensors come back all the same
                failed = failed or error
        self._held.clear()  # the parts of what is unpacked next are needed no more
        if failed is not None:
            raise failed

    def retire(self) -> None:
        """Leave ghosts everywhere, also where tensors had settled: any use says that the session is closed."""
        self._stop()
        for item in self._held:
            if id(item.entry) in self._settled and can_swap(item.entry.tensor):
                become_ghost(item.entry.tensor, View(self.loans, item.block, item.meta, self._device))

    def _rebound(self, item: Held) -> Tensor | None:
        """The memory that a settled tensor was given since, by ``.data = ...``, on its own device; None for others."""
        tensor = item.entry.tensor
        if view_of(tensor) is not None or tensor.untyped_storage()._cdata == self._settled[id(item.entry)]:
            return None
        with torch.no_grad():
            return tensor.detach().to(item.device)

    def _forget_originals(self) -> None:
        """Free the memory of tensors that nobody outside the module can see."""
        own: dict[int, int] = {}
        for tensor in self._originals.values():
            key = tensor.untyped_storage()._cdata
            own[key] = own.get(key, 0) + 1
        for item in self._held:
            tensor = self._originals[id(item.entry)]
            storage = tensor.untyped_storage()
            if storage_users(storage) <= own[storage._cdata] + 1:
                own[storage._cdata] -= 1
                del self._originals[id(item.entry)]

    def _stop(self) -> None:
        for turn in self._turns.values():
            turn.unwatch()
        self._turns.clear()
        self._conversions.unwatch()
        self.loans.step_aside = lambda: False

    def _step_aside(self) -> bool:
        return any([turn.step_aside() for turn in self._turns.values()])


def become_ghost(tensor: Tensor, view: View) -> Tensor:
    """Turn ``tensor`` itself, and so every reference to it, into a ghost; what it was comes back as another object."""
    cls = GhostParameter if isinstance(tensor, nn.Parameter) else GhostTensor
    ghost: Tensor = cls(view, tensor.requires_grad)
    become(tensor, ghost)
    return ghost


def become_real(tensor: Tensor, memory: Tensor) -> None:
    """Turn a ghost itself into a plain tensor or parameter over ``memory``.

    A graph that was made with the ghost cannot follow: its backward raises ``SessionClosedError``.
    """
    real = nn.Parameter(memory, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory
    if not isinstance(tensor, nn.Parameter):
        real.requires_grad_(tensor.requires_grad)
    held = not can_swap(tensor)
    become(tensor, real)
    if held and real.requires_grad and real.is_leaf:
        cast(Any, real).register_hook(_refuse_gradient)


def _written_to(original: Tensor, values: Tensor) -> Tensor:
    """``original`` with ``values``; dimensions along which all elements are one in memory are written once."""
    original = original.detach()
    into = original
    for dim, (size, step) in enumerate(zip(original.size(), original.stride(), strict=True)):
        if size > 1 and not step:
            into, values = into.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    with torch.no_grad():
        into.copy_(values)
    return original


def view_like(meta: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """A tensor over ``storage`` with the dtype, offset, shape and strides of ``meta``."""
    with torch.inference_mode(False), torch.no_grad():
        empty = torch.empty(0, dtype=meta.dtype, device=storage.device)
        return empty.set_(cast(Any, storage), meta.storage_offset(), meta.size(), meta.stride())


def metas_of(blocks: Mapping[str, int]) -> dict[str, torch.UntypedStorage]:
    """One meta storage per block, of the block's bytes, for the views of it."""
    return {name: torch.empty(n, dtype=torch.uint8, device="meta").untyped_storage() for name, n in blocks.items()}


def _refuse_gradient(gradient: Tensor) -> NoReturn:
    raise SessionClosedError(
        "this graph was recorded while its weights were offloaded, and the session has ended: call backward() before "
        "close(), or run the forward again"
    )
