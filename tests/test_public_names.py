"""The names that users may rely on."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import tierstore
from tierstore import errors, jobs

PUBLIC = ["Budget", "Plan", "Report", "Session", "Tier", "__version__", "load", "offload"]
JOBS = ["JobInterrupted", "JobProgress", "JobReport", "JobSettings", "Result", "Sampling", "run", "stream"]
ERRORS = {
    "TierstoreError": "Exception",
    "BudgetError": "TierstoreError",
    "PlanError": "BudgetError",
    "CapacityError": "TierstoreError",
    "StoreError": "TierstoreError",
    "StoreFormatError": "StoreError",
    "StoreReadError": "StoreError",
    "StoreFullError": "StoreError",
    "StoreMismatchError": "StoreError",
    "StoreIncompleteError": "StoreError",
    "StoreBusyError": "StoreError",
    "ChecksumError": "StoreError",
    "CheckpointError": "TierstoreError",
    "RowError": "TierstoreError",
    "ModuleError": "TierstoreError",
    "PageLostError": "TierstoreError",
    "DeviceError": "TierstoreError",
    "SessionClosedError": "TierstoreError",
}


def test_public_names() -> None:
    named = {name for name in tierstore.__all__ if not name.endswith("Error") and name != "errors"}
    assert sorted(named) == PUBLIC
    assert all(hasattr(tierstore, name) for name in tierstore.__all__)


def test_names_of_jobs() -> None:
    assert jobs.__all__ == JOBS
    assert all(hasattr(jobs, name) for name in JOBS)


def test_version_is_the_one_that_is_built() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert tierstore.__version__ == project["version"]


def test_error_tree() -> None:
    classes = {
        name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__
    }
    assert {name: cls.__bases__[0].__name__ for name, cls in classes.items()} == ERRORS
    assert tierstore.errors is errors
    drawn = [
        line.split("── ")[1].split("(")[0].split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line
    ]
    assert sorted(["TierstoreError", *drawn]) == sorted(ERRORS)
