"""tierstore: run models bigger than the GPU, or bigger than RAM, with the same numbers out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tierstore import errors
from tierstore.budget import Budget, Tier
from tierstore.plan import Plan

if TYPE_CHECKING:
    from tierstore.loading import load
    from tierstore.offloading import offload
    from tierstore.report.report import Report
    from tierstore.session import Session

__version__ = "0.1.0"

__all__ = ["Budget", "Plan", "Report", "Session", "Tier", "__version__", "errors", "load", "offload"]

_NEED_TORCH = {
    "Report": "tierstore.report.report",
    "Session": "tierstore.session",
    "load": "tierstore.loading",
    "offload": "tierstore.offloading",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for, so that plans can be made without it."""
    if name in _NEED_TORCH:
        return getattr(import_module(_NEED_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
