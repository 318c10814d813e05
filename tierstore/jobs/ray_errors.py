"""Errors of a worker, in a form that another process can raise again."""

from __future__ import annotations

from typing import Any

from tierstore import errors
from tierstore.errors import CapacityError, DeviceError, PageLostError, PlanError, TierstoreError

Wire = dict[str, Any]


def error_table(error: BaseException, where: str = "") -> Wire:
    """An error that came up in a worker ``where``, for ``error_of``."""
    text = str(error) or type(error).__name__
    kind = type(error).__name__ if isinstance(error, TierstoreError) else ""
    if not kind:
        kind = CapacityError.__name__ if _is_out_of_memory(error) else DeviceError.__name__
        text = f"{type(error).__name__}: {text}"
    return {"kind": kind, "text": f"{where}{text}", "needed": getattr(error, "needed", 0)}


def error_of(table: Wire) -> TierstoreError:
    """The error again, of its class; one that is none of ours has become a ``CapacityError`` or ``DeviceError``."""
    kind, text = getattr(errors, table["kind"], DeviceError), table["text"]
    if kind is PlanError:
        return PlanError(text, needed=table["needed"])
    if kind is PageLostError:
        return PageLostError(text, cells=())
    error: TierstoreError = kind(text)
    return error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's is no MemoryError
