"""What every format of KV pages has in common: the shape of a page, and how it is packed into a cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a page holds in one layer: ``page_tokens`` keys of ``heads`` x ``key_dim`` and values of x ``value_dim``."""

    heads: int
    key_dim: int
    value_dim: int
    page_tokens: int


class KvFormat(Protocol):
    """How a page's keys and values become a cell, and back. Immutable and without state.

    A format may keep rotated keys and values. Then queries are rotated before attention, and its output is rotated
    back: ``q @ k.T`` is the same for both rotated alike.
    """

    @property
    def name(self) -> str:
        """As users write it, such as ``"int4"``."""
        ...

    @property
    def plain(self) -> bool:
        """Whether a cell is the page itself: keys [T, H, Dk], then values [T, H, Dv], in the model's dtype."""
        ...

    @property
    def recent_tokens(self) -> int:
        """At least so many of a sequence's newest tokens stay as they are: a page is packed once its end is as far
        behind."""
        ...

    def cell_nbytes(self, shape: KvShape, dtype: torch.dtype) -> int:
        """Bytes of a cell, for a model of ``dtype``. Raises ``ModuleError`` for shapes that cannot be packed."""
        ...

    def pack(self, keys: Tensor, values: Tensor, into: Tensor) -> None:
        """Packs whole pages: ``keys`` [n, T, H, Dk] and ``values`` [n, T, H, Dv], of any strides and on any device.

        Row i of ``into``, uint8 [n, at least cell_nbytes], becomes the cell of page i. Deterministic, and each page
        depends on itself only."""
        ...

    def unpack(self, cells: Tensor, shape: KvShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [n, T, H, Dk] and values [n, T, H, Dv] in ``dtype``, of ``cells`` uint8 [n, at least cell_nbytes].

        Where something is unpacked, both are views of memory [H, n, T, D]: ``permute(2, 0, 1, 3).flatten(1, 2)`` is
        free. A plain cell is not copied: they are views of ``cells``."""
        ...

    def rotate_query(self, q: Tensor) -> Tensor:
        """``q`` [..., Dk] as it meets the unpacked keys."""
        ...

    def unrotate_output(self, out: Tensor) -> Tensor:
        """The output [..., Dv] of attention over the unpacked values, as the model expects it."""
        ...
