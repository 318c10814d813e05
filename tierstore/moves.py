"""What a decider asks a doer to move."""

from __future__ import annotations

from dataclasses import dataclass

from tierstore.budget import Tier


@dataclass(frozen=True, slots=True)
class Move:
    """Bring the bytes of ``unit`` from tier ``src`` to tier ``dst``; ``nbytes`` are weight bytes."""

    unit: str
    src: Tier
    dst: Tier
    nbytes: int
