"""Sees a module's forward begin and end, or stands for it, without hooks, which make torch take other paths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, Protocol

from torch import nn

from tierstore.binding.uninterrupted import Uninterrupted


class Around(Protocol):
    """What happens around a forward."""

    def enter(self) -> None: ...

    def leave(self, whole: bool) -> None:
        """``whole`` is False when an exception left the forward, of whatever kind."""
        ...


Through = Callable[..., Any]
"""``through(forward, *args, **kwargs)`` gives what the forward of a module gives, and calls ``forward`` for it as it
sees fit."""


def watch(module: nn.Module, around: Around, *, outermost: bool = False) -> None:
    """Let ``around`` see every forward of ``module`` from now on; the outermost enters first and leaves last."""
    forward = _forward_of(module)
    forward.around.insert(0 if outermost else len(forward.around), around)


def unwatch(module: nn.Module, around: Around) -> None:
    """The opposite of ``watch``. The module is as it was when the last one is gone."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, _Forward) and around in forward.around:
        forward.around.remove(around)
        forward.restore_unless_used()


def interpose(module: nn.Module, through: Through, *, outermost: bool = False) -> None:
    """Let ``through`` stand for the forward of ``module`` from now on, around those that were let so before.

    It stands within all that watches the forward; or ``outermost``, around it: then all of it sees every forward that
    ``through`` calls.
    """
    forward = _forward_of(module)
    (forward.outside if outermost else forward.inside).append(through)


def withdraw(module: nn.Module, through: Through) -> None:
    """The opposite of ``interpose``, in whatever order: the module is as it was when the last one is gone."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, _Forward):
        for places in (forward.outside, forward.inside):
            if through in places:
                places.remove(through)
        forward.restore_unless_used()


def is_watched(module: nn.Module) -> bool:
    """Whether anything watches the forward of ``module``."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, _Forward) and bool(forward.around)


def _forward_of(module: nn.Module) -> _Forward:
    forward = module.__dict__.get("forward")
    if not isinstance(forward, _Forward):
        forward = module.__dict__["forward"] = _Forward(module)
    return forward


def _through_all(places: list[Through], call: Callable[..., Any]) -> Callable[..., Any]:
    for through in places:
        call = partial(through, call)
    return call


def _leave_all(entered: list[Around], whole: bool) -> None:
    """Leave every one, last entered first, whatever some of them raise; the first error comes out at the end."""
    failed: BaseException | None = None
    while entered:
        try:
            with Uninterrupted():
                while entered:
                    entered.pop().leave(whole)
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed


class _Forward:
    """Stands in a module's ``forward``; a copy of the module has its own forward again."""

    def __init__(self, module: nn.Module) -> None:
        self.around: list[Around] = []
        self.outside: list[Through] = []
        self.inside: list[Through] = []
        self._module = module
        self._own = module.__dict__.get("forward")  # what the user put into this one module, if anything
        update_wrapper(self, module.forward)  # so that its signature is the forward's
        self._call = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _through_all(self.outside, self._watched)(*args, **kwargs)

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        call = _through_all(self.inside, self._call)
        if not self.around:
            return call(*args, **kwargs)
        entered: list[Around] = []
        whole = False
        try:
            with Uninterrupted():
                for around in self.around:
                    around.enter()
                    entered.append(around)
            result = call(*args, **kwargs)
            whole = True
            return result
        finally:
            _leave_all(entered, whole)

    def restore_unless_used(self) -> None:
        if self.around or self.outside or self.inside:
            return
        if self._own is None:
            del self._module.__dict__["forward"]
        else:
            self._module.__dict__["forward"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        copied: Any = memo.get(id(self._module))
        return MethodType(type(copied).forward, copied)

    def __reduce__(self) -> Any:
        return (getattr, (self._module, "forward")) if self._own is None else self._own.__reduce__()
