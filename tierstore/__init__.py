"""tierstore: run models bigger than the GPU, or bigger than RAM, with the same numbers out."""

from tierstore import errors
from tierstore.budget import Budget, Tier
from tierstore.loading import load
from tierstore.offloading import offload
from tierstore.plan import Plan
from tierstore.report.report import Report
from tierstore.session import Session

__version__ = "0.1.0"

__all__ = ["Budget", "Plan", "Report", "Session", "Tier", "__version__", "errors", "load", "offload"]
