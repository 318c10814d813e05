"""Every module of the zoo runs offloaded as it runs plain; settings take turns, so that all meet many modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.zoo import captured, changed, control, tensors, torch_classes, written
from tests.zoo.registry import ENTRIES
from tests.zoo.runner import examine, expected, need_of, settings

PARTS = (torch_classes, changed, captured, tensors, control, written)  # importing them fills the zoo
RUNS = 2


@pytest.mark.filterwarnings("ignore")  # what torch says of these modules, plain ones too
@pytest.mark.parametrize("name", ENTRIES)
def test_offloaded_is_plain(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    need, want = need_of(entry), expected(entry)
    number = list(ENTRIES).index(name)
    every = settings()
    for run in range(RUNS):
        setting = every[(number * 7 + run * 4) % len(every)]
        assert examine(entry, setting, tmp_path, need=need, want=want) == [], setting


def test_the_zoo_is_large() -> None:
    assert len(ENTRIES) >= 120
