"""Proof mode: the same run with and without offloading, compared bit for bit after every module.

    proof = prove(module, lambda m: m(x), Budget(hbm="1GiB"), store=tmp_path)
    print(proof)

A run that moved no byte proves nothing, so it fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tierstore.backends import Backend
from tierstore.budget import Budget, format_nbytes
from tierstore.offloading import offload


@dataclass(frozen=True)
class Proof:
    """What was compared: calls of submodules, tensors they returned, and the weight bytes that moved meanwhile."""

    calls: int
    tensors: int
    bytes_moved: int

    def __str__(self) -> str:
        return f"{self.tensors} tensors of {self.calls} calls equal, {format_nbytes(self.bytes_moved)} of weights moved"


def prove(
    module: nn.Module,
    run: Callable[[nn.Module], Any],
    budget: Budget,
    *,
    store: str | os.PathLike[str] | None = None,
    backend: Backend | None = None,
    passes: int = 2,
) -> Proof:
    """Run ``run(module)`` plainly, then ``passes`` times within ``budget``, and compare what every submodule returned.

    Raises ``AssertionError`` naming the first module whose output differs in any bit, in shape or in
    dtype, when other modules were called, or when no weight moved. ``run`` must be deterministic.
    """
    expected = _outputs(module, run)
    with offload(module, budget, store=store, backend=backend) as session:
        for number in range(passes):
            _compare(expected, _outputs(module, run), number)
        moved = session.report().bytes_moved
    if not moved:
        raise AssertionError(
            f"no weight moved under {budget}: the module fits, which proves nothing about offloading: lower the budget"
        )
    return Proof(len(expected), sum(len(tensors) for _, tensors in expected), moved)


_Outputs = list[tuple[str, list[Tensor]]]


def _outputs(module: nn.Module, run: Callable[[nn.Module], Any]) -> _Outputs:
    """Copies of what every submodule's forward returns, in the order in which they return, and of the result."""
    found: _Outputs = []
    handles = [
        child.register_forward_hook(lambda _module, _args, out, name=name: found.append((name, _copies(out))))
        for name, child in module.named_modules()
    ]
    try:
        found.append(("the result", _copies(run(module))))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _copies(out: Any) -> list[Tensor]:
    with torch.no_grad():
        return [leaf.detach().clone() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _compare(expected: _Outputs, got: _Outputs, number: int) -> None:
    names, seen = [name for name, _ in expected], [name for name, _ in got]
    if names != seen:
        raise AssertionError(f"pass {number}: other modules were called: {seen}, the plain run called {names}")
    for (name, plain), (_, offloaded) in zip(expected, got, strict=True):
        same = len(plain) == len(offloaded) and all(
            a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
            for a, b in zip(plain, offloaded, strict=True)
        )
        if not same:
            raise AssertionError(f"pass {number}: the output of {name or 'the module'!r} differs from the plain run's")


def _bits(tensor: Tensor) -> Tensor:
    """The bytes, so that NaNs count as equal only when they are the same."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
