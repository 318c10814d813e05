"""What a batch plan is told of pages: how many there are, and what the links carry as measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import tierstore
from tierstore.budget import Budget
from tierstore.composing import TYPICAL_LINKS
from tierstore.hf.batch.capacity import capacity_of
from tierstore.jobs.models import _tiers
from tierstore.page_plan import PageKind, build_page_plan
from tierstore.plan import Links

KIB = 1 << 10
MIB = 1 << 20


def kind(layers: range, window: int | None) -> PageKind:
    return PageKind(tuple(layers), window, 64, 32 * KIB, 256, 256, plain=True)


@pytest.mark.parametrize("unified", [False, True])
def test_pages_below_cost_what_the_links_were_seen_to_carry(unified: bool) -> None:
    plan = build_page_plan([kind(range(4), None)], 4 * MIB, 8 * MIB, 32 * MIB, unified=unified)
    memory = cast(Any, SimpleNamespace(plan=plan))
    links = Links(nvme_bytes_per_second=1e9, ram_bytes_per_second=4e9)
    tiers = _tiers(memory, capacity_of(plan.kinds), unified, links)
    nbytes = 4 * 32 * KIB
    assert [tier.seconds_per_page for tier in tiers] == [0.0, 0.0 if unified else nbytes / 4e9, nbytes / 1e9]
    assert sum(tier.pages for tier in tiers) == plan.kinds[0].pages


def test_a_session_knows_what_its_links_carry(tiny_checkpoint: Path) -> None:
    with tierstore.load(tiny_checkpoint, Budget(hbm="4MiB")) as session, torch.no_grad():
        for _ in range(2):
            session.module(input_ids=torch.tensor([[1, 2, 3]]))
        assert session.links.nvme_bytes_per_second != TYPICAL_LINKS.nvme_bytes_per_second
        assert session.links.ram_bytes_per_second == TYPICAL_LINKS.ram_bytes_per_second, "nothing came from there"


def test_windows_bound_how_many_sequences_there_are_and_not_how_long() -> None:
    both = [kind(range(2), None), kind(range(2, 4), 128)]
    plans = build_page_plan(both, 8 * MIB, 0, 0, unified=True).kinds
    assert capacity_of(plans).pages == plans[0].pages
    assert capacity_of(plans).sequence_pages is None
    only = build_page_plan([kind(range(4), 128)], 4 * MIB, 0, 0, unified=True).kinds
    assert capacity_of(only).pages == only[0].pages
    assert capacity_of(only).sequence_pages == only[0].kind.sequence_pages == 4
    # a window that pages do not even hold once bounds the length too
    few = replace(plans[1], pages=3)
    assert capacity_of([plans[0], few]).pages == 3
    assert capacity_of([few]).sequence_pages is None
    two = build_page_plan([kind(range(2), 128), kind(range(2, 4), 1024)], 8 * MIB, 0, 0, unified=True).kinds
    room = capacity_of(two)
    assert room.sequence_pages is not None
    for each in two:
        assert each.kind.sequence_pages is not None
        many = min(room.pages // room.sequence_pages, room.open_pages)
        assert many * each.kind.sequence_pages <= each.pages
