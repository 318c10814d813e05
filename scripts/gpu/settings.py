"""Which parts there are, and what each is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """``device`` computes; ``smoke`` asks for tiny sizes; files may be made below ``scratch``. A part may take
    ``seconds``, so it stops measuring, and says what it has, a little before. ``layers`` of the giant are those that it
    had when it ran before, 0 when it did not."""

    device: str
    smoke: bool
    scratch: str
    seconds: float
    layers: int = 0


@dataclass(frozen=True)
class Part:
    """``module`` of this package has ``measure(settings)``, which returns figures, and what it can."""

    name: str
    module: str
    seconds: float


PARTS = (
    Part("environment", "environment", 40),
    Part("tests", "suite", 150),
    Part("streaming", "streaming", 45),
    Part("overlap", "overlap", 50),
    Part("kernels", "kernels", 60),
    Part("pages", "pages", 60),
    Part("disk", "disk", 50),
    Part("giant", "giant", 130),
    Part("accelerate", "beside", 100),
)
"""In this order. Most end long before their limits, which together are more than ``gpu_check`` may take."""
