"""Settings of a row: what is taken, and what is said of the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tierstore.errors import RowError
from tierstore.sampling import MOST_STOPS, STOP_CHARACTERS, Sampling


def test_what_is_given_takes_the_place_of_the_base() -> None:
    base = Sampling(temperature=0.5, seed=7, stop=("x",))
    merged = Sampling.checked(base, temperature=1, stop=["a", "b"], seed=None, n=3)
    assert merged == Sampling(temperature=1.0, seed=7, stop=("a", "b"), n=3)
    assert type(merged.temperature) is float
    assert Sampling.checked() == Sampling()
    assert Sampling.checked(base, stop=[]).stop == ()
    assert Sampling.checked(stop="end").stop == ("end",)


WRONG: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, True, 2.0, "8", 1 << 31, [8]],
    "temperature": [-0.1, math.nan, math.inf, True, "1", 10**400, {}],
    "top_p": [-0.1, 1.1, "0.5"],
    "top_k": [-1, 1.5],
    "min_p": [-1, 2],
    "repetition_penalty": [0, -1, 1e9, 1e-300],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [3],
    "seed": [-1, 1 << 63, 10**4000, 1.0, False],
    "stop": [5, "", [""], [1], ["a"] * (MOST_STOPS + 1), "a" * (STOP_CHARACTERS + 1), {"a": 1}],
    "n": [0, 129, True],
    "ignore_eos": [1, "yes"],
}


@pytest.mark.parametrize("name", Sampling.__dataclass_fields__)
def test_wrong_values_are_errors_that_name_the_setting(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(RowError, match=rf"^{name} (is|has) .*(needed|possible)$") as raised:
            Sampling.checked(**{name: value})
        assert len(str(raised.value)) < 300


def test_unknown_names_are_errors() -> None:
    with pytest.raises(RowError, match="'temprature' is no setting"):
        Sampling.checked(temprature=1)


def test_bounds_are_taken() -> None:
    bounds: list[dict[str, Any]] = [
        {"top_p": 0},
        {"top_p": 1},
        {"seed": (1 << 63) - 1},
        {"n": 128},
        {"presence_penalty": -2},
    ]
    for given in bounds:
        Sampling.checked(**given)
