"""Budgets: sizes as people write them, all bounds validated at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.budget import Budget, format_nbytes, parse_nbytes
from tierstore.errors import BudgetError

FIELDS = ("hbm", "ram", "nvme", "kv_hbm", "kv_ram", "kv_nvme", "activations")
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "gib": 1 << 30, "TiB": 1 << 40, "kB": 10**3, "GB": 10**9}


@given(number=st.integers(0, 10**6), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " "]))
def test_text_is_a_number_times_its_unit(number: int, unit: str, space: str) -> None:
    assert parse_nbytes(f"{number}{space}{unit}") == number * UNITS[unit]


@given(sizes=st.lists(st.integers(1, 1 << 50), min_size=len(FIELDS), max_size=len(FIELDS)))
def test_every_bound_is_kept_and_printed(sizes: list[int]) -> None:
    given_bounds: dict[str, Any] = dict(zip(FIELDS, sizes, strict=True))
    budget = Budget(**{name: f"{nbytes} B" for name, nbytes in given_bounds.items()})
    assert {name: getattr(budget, name) for name in FIELDS} == given_bounds
    assert budget == Budget(**given_bounds)
    assert hash(budget) == hash(Budget(**given_bounds))
    assert all(f"{name}={nbytes}" in repr(budget) for name, nbytes in given_bounds.items())


def test_what_is_not_said() -> None:
    budget = Budget("1GiB")
    assert (budget.ram, budget.kv_hbm, budget.kv_ram, budget.kv_nvme) == (0, 0, 0, 0)
    assert budget.nvme is budget.activations is None
    assert Budget("1GiB", kv_hbm="1.5MiB").kv_hbm == 3 << 19
    with pytest.raises(TypeError):
        Budget(1, 0, None, 1)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("wrong", [-1, "-1GiB", "lots", "1 XB", "1.5", 1.5, True, "", b"1"])
def test_a_wrong_size_names_its_field(name: str, wrong: Any) -> None:
    with pytest.raises(BudgetError, match=rf"^Budget\.{name} "):
        Budget(**{"hbm": 1, "kv_hbm": 1, name: wrong})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"hbm": 0}, r"Budget\.hbm is 0"),
        ({"hbm": 1, "kv_ram": 1}, r"Budget\.kv_ram is given and Budget\.kv_hbm is 0"),
        ({"hbm": 1, "kv_nvme": "1GiB"}, r"Budget\.kv_nvme is given and Budget\.kv_hbm is 0"),
        ({"hbm": 1, "activations": 0}, r"Budget\.activations is 0"),
    ],
)
def test_bounds_that_make_no_sense_together(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**bounds)


def test_bytes_for_people() -> None:
    assert [format_nbytes(n) for n in (0, 1023, 1536, 3 << 40)] == ["0 B", "1023 B", "1.50 KiB", "3.00 TiB"]
