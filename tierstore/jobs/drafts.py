"""Tokens that may come next are tried beside the one that does: who suggests them, and how many are worth it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from tierstore.batch_schedule import Limits
from tierstore.jobs.samples import Sample


class Drafting(Protocol):
    """Suggests tokens, which change no text: those that the model would not have chosen are dropped."""

    def propose(self, samples: Collection[Sample], limits: Limits) -> None:
        """Set ``drafted`` of each of ``samples``, which go on in the next pass."""
        ...

    def tried(self, sample: Sample, drafted: int, accepted: int) -> None:
        """So many of the tokens drafted for ``sample`` were tried, and so many were right."""
        ...

    def timed(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        ...

    def forget(self, sequence: int) -> None:
        """The sequence, which may be unknown here, is gone."""
        ...
