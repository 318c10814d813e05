"""Random trees of modules with random wiring, compared with the plain run."""

# To torch's types an attribute of a module is a Tensor or a Module.
# mypy: disable-error-code="arg-type, no-any-return, operator"

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo.registry import Entry, floats
from tests.zoo.runner import BACKENDS, SHARES, Setting, examine

SIZE = 8
LEAVES = 5

Step = tuple[str, int, int]
STEPS = st.tuples(
    st.sampled_from(["call", "weight", "cat", "write", "rebind", "keep", "use", "branch"]),
    st.integers(0, LEAVES - 1),
    st.integers(0, LEAVES - 1),
)


class Node(nn.Module):
    """Runs ``steps`` over leaves that it may share with others, and its children in between."""

    def __init__(self, steps: list[Step], leaves: list[nn.Linear], own: list[int], children: list[Node]) -> None:
        super().__init__()
        self.steps = steps
        self.reach = [leaves]  # in a list of lists: not registered here
        self.mine = nn.ModuleList([leaves[number] for number in own])
        self.below = nn.ModuleList(children)
        self.register_buffer("state", torch.ones(SIZE, SIZE))
        self.kept: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        leaves = self.reach[0]
        for number, (kind, one, other) in enumerate(self.steps):
            a, b = leaves[one], leaves[other]
            if kind == "call":
                x = a(x).tanh()
            elif kind == "weight":
                x = F.linear(x, a.weight, b.bias).tanh()
            elif kind == "cat":
                x = (x @ torch.cat([a.weight, b.weight]).T)[:, :SIZE].tanh()
            elif kind == "write":
                with torch.no_grad():
                    a.weight.mul_(0.9)
                    self.state.add_(0.1)
            elif kind == "rebind":
                a.bias.data = b.bias.data * 0.5
            elif kind == "keep":
                self.kept = [a.weight.detach()[1:3]]
            elif kind == "use":
                x = x + sum(kept.sum() for kept in self.kept)
            elif kind == "branch" and (self.calls + number) % 2:
                x = a(b(x)).tanh()
            if number < len(self.below):
                x = self.below[number](x)
        return x @ self.state * 0.1


@st.composite
def builders(draw: Callable[..., Any]) -> Callable[[], nn.Module]:
    count = draw(st.integers(1, 4))
    plans = [
        (draw(st.lists(STEPS, min_size=1, max_size=4)), draw(st.lists(st.integers(0, LEAVES - 1), max_size=2)))
        for _ in range(count)
    ]
    ties = draw(st.lists(st.tuples(st.integers(0, LEAVES - 1), st.integers(0, LEAVES - 1)), max_size=2))

    def build() -> nn.Module:
        leaves = [nn.Linear(SIZE, SIZE) for _ in range(LEAVES)]
        for one, other in ties:
            leaves[one].weight = leaves[other].weight
        nodes: list[Node] = []
        for number, (steps, own) in enumerate(plans):
            everything = list(range(LEAVES)) if number == len(plans) - 1 else own
            children = [nodes[-1]] if nodes and number % 2 == 0 else list(nodes)
            nodes.append(Node(steps, leaves, everything, children))
        return nodes[-1]

    return build


@settings(deadline=None, max_examples=25)
@given(builders(), st.sampled_from(BACKENDS), st.sampled_from(SHARES), st.integers(0, 9))
def test_any_wiring(build: Callable[[], nn.Module], backend: str, share: float, seed: int) -> None:
    # writes in forward make a backward over the same weights an error in plain torch too
    entry = Entry(build, floats(2, SIZE), grads=False, copies=False)
    with TemporaryDirectory() as folder:
        assert examine(entry, Setting(backend, share, seed), Path(folder)) == []
