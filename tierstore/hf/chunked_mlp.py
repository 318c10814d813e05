"""MLPs of decoder layers, run over some tokens at a time: what lives within one is the widest of all activations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tierstore.binding.forwards import interpose, is_watched, withdraw
from tierstore.errors import ModuleError
from tierstore.hf.layers import layers_path
from tierstore.hf.model import listed

TRIAL_TOKENS = 6
TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.01}
"""How far rows of a trial may be apart, of their largest value, as products add in another order. Else ``1e-4``."""


class ChunkedMlps:
    """The MLPs in ``module``'s decoder layers. From ``open()`` to ``close()`` each takes ``tokens`` tokens at a time.

    An MLP is a part of a layer with several matrices that is called with one tensor of hidden states, [B, L, H], and
    gives one of the same shape. It is trusted to treat tokens one by one when it has done so with random ones, before
    it is first to take some at a time. Left alone are those that fail this trial, blocks of experts (each chunk would
    need nearly all of them again), and those whose parts are fetched one by one (each chunk would fetch them again).
    Where gradients are recorded all tokens are taken at once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tokens: int | None = None
        """At a time, of all rows of a batch together; None is all of them."""
        self._left: dict[str, list[str]] = {}
        self._mlps: dict[str, nn.Module] = {}
        self._opened: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._trusted: set[str] = set()
        try:
            path = layers_path(module)
        except ModuleError:
            self._leave(type(module).__name__, "it has no list of layers")
            return
        for number, layer in enumerate(module.get_submodule(path).children()):
            self._look_at(f"{path}.{number}", layer)

    @property
    def complete(self) -> bool:
        """Whether every layer has an MLP that takes some tokens at a time, as far as is known yet."""
        return not self._left

    @property
    def notes(self) -> tuple[str, ...]:
        """What takes all tokens at once, and why."""
        return tuple(
            f"takes all tokens of a chunk at once, {why}: {listed(names)}" for why, names in self._left.items()
        )

    def open(self) -> None:
        """Begin."""
        for name, mlp in self._mlps.items():
            through = partial(self._through, name)
            interpose(mlp, through)
            self._opened.append((mlp, through))

    def close(self) -> None:
        """Leave the modules as they were found. Idempotent."""
        while self._opened:
            withdraw(*self._opened.pop())

    def _look_at(self, path: str, layer: nn.Module) -> None:
        found = dict(_candidates(layer))
        if not found:
            self._leave(path, "as none of its parts is called as an MLP")
        for name, part in found.items():
            if any(isinstance(inner, nn.ModuleList) for inner in part.modules()) or any(
                parameter.dim() > 2 for parameter in part.parameters()
            ):
                self._leave(f"{path}.{name}", "as it has experts")
            elif any(is_watched(inner) for inner in part.modules() if inner is not part):
                self._leave(f"{path}.{name}", "as its parts are fetched one by one")
            else:
                self._mlps[f"{path}.{name}"] = part

    def _leave(self, name: str, why: str) -> None:
        self._mlps.pop(name, None)
        self._left.setdefault(why, []).append(name)

    def _through(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if self.tokens is None or name not in self._mlps or not isinstance(hidden, Tensor) or hidden.dim() != 3:
            return forward(*args, **kwargs)
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        if rows.shape[1] <= self.tokens or _records(hidden, self._mlps[name]):
            return forward(hidden)
        if name not in self._trusted:
            if why := _trial(forward, hidden):
                self._leave(name, why)
                return forward(hidden)
            self._trusted.add(name)
        made = torch.empty_like(rows)
        for start in range(0, rows.shape[1], self.tokens):
            made[:, start : start + self.tokens] = forward(rows[:, start : start + self.tokens])
        return made.view(hidden.shape)


def _candidates(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts with several matrices that are called with one argument."""
    for name, part in layer.named_children():
        matrices = [parameter for parameter in part.parameters() if parameter.dim() > 1]
        parameters = inspect.signature(part.forward).parameters.values()
        if len(matrices) > 1 and len(parameters) == 1 and not isinstance(part, nn.ModuleList):
            yield name, part


def _records(hidden: Tensor, mlp: nn.Module) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in mlp.parameters()))


def _trial(forward: Callable[..., Any], like: Tensor) -> str:
    """Why an MLP is not to be trusted: random tokens of very different size are given to it together, and then in
    another order and some at a time. Empty when that gives the same."""
    random = torch.Generator().manual_seed(0)  # a generator of its own: that of the user's samples is not moved on
    tokens = torch.randn(TRIAL_TOKENS, like.shape[-1], generator=random) * 2.0 ** torch.arange(TRIAL_TOKENS)[:, None]
    tokens = tokens.to(like.device, like.dtype)
    order = torch.randperm(TRIAL_TOKENS, generator=random).to(like.device)
    whole = forward(tokens.view(2, -1, like.shape[-1]))
    if not isinstance(whole, Tensor) or whole.shape != (2, TRIAL_TOKENS // 2, like.shape[-1]):
        return "as it gives something else than hidden states"
    parts = torch.cat([forward(some[None])[0] for some in tokens[order].view(3, -1, like.shape[-1])]).float()
    want = whole.reshape(parts.shape)[order].float()
    near = TOLERANCE.get(like.dtype, 1e-4) * want.abs().amax(-1, keepdim=True)
    return "" if bool(((parts - want).abs() <= near).all()) else "as tokens have an effect on each other in it"
