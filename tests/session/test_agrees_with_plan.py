"""What a session moves is what its plan and the simulator say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import tierstore
from tierstore import Budget, Tier
from tierstore.backends import Backend
from tierstore.plan import Links
from tierstore.simulate import simulate
from tierstore.tensors import Block, Unit

PASSES = 6
LAYER = 4 * (256 * 256 + 256)


def stack(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers))).eval()


@pytest.mark.parametrize("layers_in_hbm", [4, 6.5, 9])
def test_bytes_moved(tmp_path: Path, make_backend: Callable[[], Backend], layers_in_hbm: float) -> None:
    module = stack(10)
    backend = make_backend()
    # without unified memory the weights rest in RAM; with it, on disk
    ram = 0 if backend.engine.unified else 12 * LAYER
    budget = Budget(int(layers_in_hbm * LAYER), ram=ram)
    with tierstore.offload(module, budget, store=tmp_path, backend=backend) as session, torch.no_grad():
        plan = session.plan
        before = session.report().bytes_moved
        for _ in range(PASSES):
            module(torch.ones(1, 256))
        report = session.report()
    units = [unit_of(name, LAYER) for name in plan.order]
    replay = simulate(
        units,
        plan.order,
        plan.tier,
        ring_nbytes=plan.ring_nbytes,
        staging_nbytes=plan.staging_nbytes,
        unified=plan.unified,
        links=Links(1e9, 1e9),
        passes=PASSES + 1,
    )
    link = "nvme" if plan.unified else "ram"
    steady = replay.link_nbytes[-1][link]
    assert steady == plan.streamed_nbytes
    assert steady == sum(move.nbytes for move in plan.moves(units) if move.dst is Tier.HBM)
    assert {move.unit for move in plan.moves(units)} == {name for name in plan.order if plan.tier[name] is not Tier.HBM}
    # the last pass has begun to fetch for the next one: at most a ring full
    moved = report.bytes_moved - before
    assert 0 <= moved - PASSES * steady + plan.ring_nbytes <= 2 * plan.ring_nbytes
    assert report.misses == 0
    assert report.peak_bytes["hbm"] <= budget.hbm
    assert replay.peak_nbytes[Tier.HBM] <= budget.hbm


def unit_of(name: str, nbytes: int) -> Unit:
    return Unit(name, (Block(name, nbytes, 64, ()),))


def test_the_plan_learns_what_was_measured(tmp_path: Path) -> None:
    module = stack(6)
    with tierstore.offload(module, Budget(4 * LAYER), store=tmp_path) as session, torch.no_grad():
        guessed = session.plan
        for _ in range(3):
            module(torch.ones(1, 256))
        measured = session.plan
    assert measured.tier == guessed.tier
    assert measured.streamed_nbytes == guessed.streamed_nbytes
    assert measured.seconds_each != guessed.seconds_each
    assert measured.seconds_per_pass >= max(measured.seconds_each.values())
    assert "a pass takes about" in measured.explain()


def test_a_table_whose_rows_are_read_moves_only_these(tmp_path: Path, make_backend: Callable[[], Backend]) -> None:
    """The table rests on disk: no pass brings it whole, and the plan says so before and after it was measured."""
    torch.manual_seed(0)
    table = nn.Embedding(4096, 256)
    module = nn.Sequential(table, *(nn.Linear(256, 256) for _ in range(4))).eval()
    ids = torch.arange(0, 4096, 512).reshape(2, 4)
    with torch.no_grad():
        expected = module(ids)
    backend = make_backend()
    budget = Budget(int(4.5 * 2**20), ram=0 if backend.engine.unified else "3MiB")
    with tierstore.offload(module, budget, store=tmp_path, backend=backend) as session, torch.no_grad():
        for _ in range(4):
            assert torch.equal(module(ids), expected)
        plan, report = session.plan, session.report()
    assert plan.tier["0.weight"] is Tier.NVME
    assert "0.weight" not in plan.order
    assert 0 < report.bytes_moved < 2 * 4096 * 256 * 4  # four passes over the table alone would be twice that
    assert report.peak_bytes["hbm"] <= budget.hbm
