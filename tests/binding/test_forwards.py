"""What watches a forward and what stands for it are nested as they said, and nothing of them stays."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tierstore.binding.forwards import interpose, is_watched, unwatch, watch, withdraw


class Twice(nn.Module):
    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        return x * times


class Watcher:
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def enter(self) -> None:
        self.said.append("enter")

    def leave(self, whole: bool) -> None:
        self.said.append("leave" if whole else "break off")


def through(said: list[str], name: str, forward: Callable[..., Any], x: Tensor, **kwargs: Any) -> Any:
    said.append(name)
    return torch.cat([forward(part, **kwargs) for part in x.chunk(2)]) if name == "outside" else forward(x, **kwargs)


def test_who_sees_whom() -> None:
    said: list[str] = []
    module = Twice()
    signature = inspect.signature(module.forward)
    interpose(module, partial(through, said, "inside"))
    interpose(module, partial(through, said, "outside"), outermost=True)
    watch(module, Watcher(said))
    interpose(module, partial(through, said, "around inside"))
    assert inspect.signature(module.forward) == signature
    assert is_watched(module)
    assert torch.equal(module(torch.arange(4), times=3), torch.arange(4) * 3)
    one = ["enter", "around inside", "inside", "leave"]
    assert said == ["outside", *one, *one]


def test_errors_go_through() -> None:
    said: list[str] = []
    module = Twice()
    watch(module, Watcher(said))
    interpose(module, partial(through, said, "outside"), outermost=True)
    interpose(module, lambda forward, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module(torch.arange(4))
    assert said == ["outside", "enter", "break off"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_undone_in_any_order(order: tuple[int, ...], own: bool) -> None:
    module, watcher = Twice(), Watcher([])
    if own:
        module.__dict__["forward"] = torch.neg
    before = dict(module.__dict__)
    throughs = [partial(through, [], name) for name in ("inside", "outside")]
    interpose(module, throughs[0])
    interpose(module, throughs[1], outermost=True)
    watch(module, watcher)
    undo: list[Callable[[], None]] = [
        partial(withdraw, module, throughs[0]),
        partial(withdraw, module, throughs[1]),
        partial(unwatch, module, watcher),
    ]
    for number in order:
        assert module.__dict__ != before
        undo[number]()
    assert module.__dict__ == before
    for again in undo:
        again()
    assert module.__dict__ == before


def test_a_copy_has_a_forward_of_its_own() -> None:
    said: list[str] = []
    module = Twice()
    interpose(module, partial(through, said, "inside"))
    assert torch.equal(copy.deepcopy(module)(torch.ones(2)), torch.full((2,), 2.0))
    assert said == []
