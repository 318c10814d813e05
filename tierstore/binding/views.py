"""What a stand-in stands for, and where its bytes come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor

from tierstore.binding.slot import Slot

KEY = "_tierstore_view"


class Home(Protocol):
    """Where ghosts get their bytes."""

    def loan(self, blocks: Sequence[str], *, written: Sequence[str]) -> AbstractContextManager[Mapping[str, Slot]]:
        """Hold ``blocks`` in memory inside the ``with``; at its end the ``written`` ones are kept."""
        ...

    def lookup(self, block: str, meta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor] | None:
        """Only the rows of a 2-D block that ``indices`` name, and the indices into those rows; or None."""
        ...


class View:
    """Which bytes a ghost stands for: a block, seen through the meta tensor ``meta``.

    ``attached``: a plain tensor in the ghost's place would require grad, though the ghost cannot: a view
    in inference mode has the flag of its source, and some operations take another path by it.
    """

    __slots__ = ("attached", "block", "device", "home", "meta")

    def __init__(self, home: Home, block: str, meta: Tensor, device: torch.device, attached: bool = False) -> None:
        self.attached = attached
        self.home = home
        self.block = block
        self.meta = meta
        self.device = device


class Ghost:
    """Marks the classes of stand-ins."""


def view_of(tensor: Tensor) -> View | None:
    """The view behind a ghost; None for any other tensor."""
    return cast(View, tensor.__dict__[KEY]) if isinstance(tensor, Ghost) else None
