"""What a job can be told, and what not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.jobs.small import settings_of
from tierstore.budget import Budget
from tierstore.errors import BudgetError
from tierstore.jobs.settings import MOST_TOKENS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sequences": 0}, "sequences is 0: give at least 1"),
        ({"tokens": 0}, "tokens is 0: give at least 1"),
        ({"tokens": MOST_TOKENS + 1}, f"tokens is {MOST_TOKENS + 1}: give at most {MOST_TOKENS}"),
        ({"speculate": "wildly"}, "speculate is 'wildly'"),
        ({"budget": Budget("1GiB", activations="1MiB")}, "leave Budget.activations out"),
    ],
)
def test_what_cannot_be_is_an_error(change: dict[str, Any], why: str) -> None:
    with pytest.raises(BudgetError, match=why):
        settings_of(Path("m"), **change)
