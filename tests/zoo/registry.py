"""What the zoo is made of: modules that somebody, somewhere, writes, each with inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Args = tuple[Any, ...]
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Entry:
    """How to make a module, and arguments of its calls, one tuple per call.

    ``grads``: a backward is possible. ``copies``: deepcopy and state dicts are possible. ``edits``: parameters can be
    written by hand with the same outcome, whatever the module does itself.
    """

    build: Build
    inputs: Callable[[], list[Args]]
    grads: bool = True
    copies: bool = True
    edits: bool = True


class Expected(Exception):
    """What modules of the zoo raise on purpose."""


class Interrupted(KeyboardInterrupt):
    """As if somebody had pressed Ctrl-C."""


ENTRIES: dict[str, Entry] = {}


def add(
    name: str,
    build: Build,
    inputs: Callable[[], list[Args]],
    *,
    grads: bool = True,
    copies: bool = True,
    edits: bool = True,
) -> None:
    """Put a module into the zoo."""
    assert name not in ENTRIES, name
    ENTRIES[name] = Entry(build, inputs, grads, copies, edits)


def entry(
    inputs: Callable[[], list[Args]], *, grads: bool = True, copies: bool = True, edits: bool = True
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Put a class of modules, or a function that makes one, into the zoo under its own name."""

    def put(build: type[nn.Module]) -> type[nn.Module]:
        add(build.__name__, build, inputs, grads=grads, copies=copies, edits=edits)
        return build

    return put


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], list[Args]]:
    """Two calls with one tensor: of ``shape``, and with another size in front."""
    return lambda: [(torch.randn(*shape, dtype=dtype),), (torch.randn(shape[0] + 1, *shape[1:], dtype=dtype),)]


def ints(high: int, *shape: int) -> Callable[[], list[Args]]:
    """As ``floats``, with integers below ``high``."""
    return lambda: [(torch.randint(high, shape),), (torch.randint(high, (shape[0] + 1, *shape[1:])),)]


def both(*first: Any, second: Args = ()) -> Callable[[], list[Args]]:
    """Calls with given arguments, made anew each time by callables."""

    def make(args: Args) -> Args:
        return tuple(a() if callable(a) and not isinstance(a, Tensor) else a for a in args)

    return lambda: [make(first), make(second or first)]


def randn(*shape: int) -> Callable[[], Tensor]:
    """A callable that makes a tensor, for ``both``."""
    return lambda: torch.randn(*shape)
