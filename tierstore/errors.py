"""Every error tierstore raises, as one tree.

    TierstoreError
    ├── BudgetError(ValueError)            a number in a budget is wrong, or beyond the machine
    │   └── PlanError                      nothing fits the budget; says the smallest one that would
    ├── CapacityError(MemoryError)         an operation needs more than the tier holds, while running
    ├── StoreError(OSError)                a store cannot be used
    │   ├── StoreFormatError(ValueError)   a header, index or manifest is malformed or hostile
    │   ├── StoreReadError                 a read failed or came up short
    │   ├── StoreFullError                 no room below ``store=``
    │   ├── StoreMismatchError             the directory belongs to another model
    │   ├── StoreIncompleteError           the directory was left half-written
    │   ├── StoreBusyError                 another live process uses the directory
    │   └── ChecksumError                  bytes came back different from what was written
    ├── CheckpointError(ValueError)        a checkpoint does not describe the model it is loaded into
    ├── RowError(ValueError)               a row of a batch cannot be answered; the others can
    ├── ModuleError(TypeError)             a module or parameter cannot be offloaded, with the reason
    ├── PageLostError(LookupError)         cells of KV pages that were put down cannot be brought back
    ├── DeviceError(RuntimeError)          a device, driver or option this machine does not have
    └── SessionClosedError(RuntimeError)   a session was used after ``close()``

Each message names the thing, the need, the have and the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TierstoreError(Exception):
    """Base of every error raised by tierstore."""


class BudgetError(TierstoreError, ValueError):
    """A budget is malformed, negative, or beyond the machine."""


class PlanError(BudgetError):
    """No plan fits the budget. ``needed`` is the smallest ``hbm``, in bytes, that would."""

    def __init__(self, message: str, *, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class CapacityError(TierstoreError, MemoryError):
    """One operation needs more bytes at once than its tier may hold; ``of_pages`` where these are a KV cache's."""

    def __init__(self, message: str = "", *, of_pages: bool = False) -> None:
        super().__init__(message)
        self.of_pages = of_pages


class StoreError(TierstoreError, OSError):
    """A store cannot be opened, read or written."""


class StoreFormatError(StoreError, ValueError):
    """A header, index or manifest is malformed, overlapping, lying or hostile."""


class StoreReadError(StoreError):
    """A read failed or came up short."""


class StoreFullError(StoreError):
    """The filesystem or the ``nvme`` budget has no room for what must be written."""


class StoreMismatchError(StoreError):
    """The store directory holds another model."""


class StoreIncompleteError(StoreError):
    """The store directory was left half-written."""


class StoreBusyError(StoreError):
    """Another live process holds the store directory."""


class ChecksumError(StoreError):
    """Bytes read back differ from the bytes that were written."""


class CheckpointError(TierstoreError, ValueError):
    """A checkpoint and the model it is loaded into disagree."""


class RowError(TierstoreError, ValueError):
    """One row of a batch is malformed, or asks for what cannot be honoured. The other rows are not concerned."""


class ModuleError(TierstoreError, TypeError):
    """A module or one of its parameters cannot be offloaded."""


class PageLostError(TierstoreError, LookupError):
    """Cells of KV pages cannot be brought back: missing, or not the bytes that were put down.

    ``cells`` says which: ``(run, cell)`` each from a ``PageStore``, ``(layer, page)`` each from a pager."""

    def __init__(self, message: str, *, cells: Sequence[tuple[Any, int]]) -> None:
        super().__init__(message)
        self.cells = tuple(cells)


class DeviceError(TierstoreError, RuntimeError):
    """A device, a driver or an option that this machine does not have was asked for."""


class SessionClosedError(TierstoreError, RuntimeError):
    """A session, or a weight that only it could bring, was used after it was closed."""
