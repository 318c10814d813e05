"""A pytest plugin that writes down each test as it ends, so that a crash or a hang loses only the test it is in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LONGEST = 4000
"""Characters kept of a failure."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file to which a line of JSON is added for each test")
    parser.addoption("--share", type=int, default=0, help="which of --shares equal shares of the tests to run")
    parser.addoption("--shares", type=int, default=1, help="into how many shares tests are divided")


@pytest.hookimpl(trylast=True)  # when those are gone that are not for a GPU
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[config.getoption("--share") :: config.getoption("--shares")]


class Outcomes:
    """Adds a line for every test: begun, then passed, failed or skipped."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._add(nodeid, "begun", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._add(report.nodeid, "failed", f"{report.when}: {report.longreprtext[-LONGEST:]}")
        elif report.skipped:
            why = report.longrepr
            self._add(report.nodeid, "skipped", why[2] if isinstance(why, tuple) else str(why))
        elif report.when == "call":
            self._add(report.nodeid, "passed", "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report.nodeid, "failed", f"collection: {report.longreprtext[-LONGEST:]}")

    def _add(self, test: str, outcome: str, why: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([test, outcome, why]) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.getoption("--outcomes")
    if path is not None:
        config.pluginmanager.register(Outcomes(path))
