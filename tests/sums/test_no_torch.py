"""Floors 0 and 1, and plans made from the package's front door, work where torch is not installed."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
for name in ("torch", "numpy", "zarr", "transformers"):
    sys.modules[name] = None
import tierstore
import tierstore.batch_plan, tierstore.batch_schedule
import tierstore.arena, tierstore.contracts, tierstore.events, tierstore.extents, tierstore.ledger, tierstore.moves
import tierstore.order, tierstore.page_plan, tierstore.pages, tierstore.simulate, tierstore.slots, tierstore.tensors
from tierstore.plan import Links, build_plan
from tierstore.tensors import Block, Unit
units = [Unit(str(n), (Block(str(n), 100, 1, ()),)) for n in range(4)]
plan = build_plan(units, "0123", tierstore.Budget(250), links=Links(1e9, 1e9), unified=True)
print(plan.ring_nbytes + sum(plan.resident_nbytes[t] for t in (tierstore.Tier.HBM,)))
"""


def test_plans_need_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 200 <= int(done.stdout) <= 250
