"""Decides which micro-batches of a pass keep what they hold on the device while they wait, and which in host memory.

All micro-batches go through a unit of weights before the next one is fetched; what one of them holds until its turn,
its hidden states above all, waits. A fixed set of them keeps it on the device; the others have it there from shortly
before their turn until shortly after it. Moving costs bandwidth that weights need, so nothing moves where all fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from tierstore.budget import format_nbytes
from tierstore.extents import align_up

LEAVING = 2
"""So many micro-batches may be on their way to the host at once that nobody waits for; they are still on the device."""

IN_TRANSIT = 2 + LEAVING
"""Of those that move, so many are on the device at a time: the one that computes, the next one, and those leaving."""

SHARE = 16
"""One part in so many of ``hbm``, beside what it bounds, may be held by micro-batches that wait, and so may one of
``ram`` be."""

ALIGN = 4096
"""Places in host memory begin at multiples of this."""


@dataclass(frozen=True, slots=True)
class WaitingRoom:
    """A waiting micro-batch holds up to ``nbytes_per_token`` for each of its tokens, and ``moved_nbytes_per_token`` at
    all waits of a pass together. ``device_nbytes`` of the device and ``host_nbytes`` of host memory are for them; what
    comes back to the device takes ``seconds_per_byte``."""

    nbytes_per_token: int
    moved_nbytes_per_token: int
    device_nbytes: int
    host_nbytes: int
    seconds_per_byte: float

    def place_nbytes(self, tokens: int) -> int:
        """Bytes of host memory for what a micro-batch of ``tokens`` holds."""
        return align_up(max(tokens * self.nbytes_per_token, 1), ALIGN)

    def on_device(self, tokens: int) -> int:
        """How many micro-batches of ``tokens`` may be on the device at once, computing, waiting and moving."""
        return max(self.device_nbytes // max(tokens * self.nbytes_per_token, 1), IN_TRANSIT)

    def most(self, tokens: int) -> int:
        """How many micro-batches of ``tokens`` a pass can have."""
        on_device = self.on_device(tokens)
        return max(on_device, on_device - IN_TRANSIT + self.host_nbytes // self.place_nbytes(tokens))

    def of_calls(self, tokens: int, tokens_each: float) -> WaitingRoom:
        """The same room for calls of up to ``tokens``, and of ``tokens_each`` in the mean, as if they were tokens."""
        moved = ceil(self.moved_nbytes_per_token * tokens_each)
        return replace(self, nbytes_per_token=self.nbytes_per_token * tokens, moved_nbytes_per_token=moved)

    def plan(self, micro_batches: int, tokens: int) -> WaitingPlan:
        """Where those of passes of up to ``micro_batches`` wait. Raises ``ValueError`` for more than ``most``."""
        if not 1 <= micro_batches <= self.most(tokens):
            raise ValueError(f"{micro_batches} micro-batches of {tokens} tokens: from 1 to {self.most(tokens)} fit")
        return WaitingPlan(micro_batches, self.on_device(tokens), self.place_nbytes(tokens))

    def seconds(self, micro_batches: int, tokens: int) -> float:
        """What coming back to the device takes in a pass."""
        nbytes = _moving(micro_batches, self.on_device(tokens)) * tokens * self.moved_nbytes_per_token
        return nbytes * self.seconds_per_byte


@dataclass(frozen=True, slots=True)
class WaitingPlan:
    """Of a pass of up to ``micro_batches``, ``on_device`` may be on the device at once, computing, waiting and moving.
    Each of those that move has ``place_nbytes`` of host memory."""

    micro_batches: int
    on_device: int
    place_nbytes: int

    @property
    def moving(self) -> int:
        """How many have a place in host memory."""
        return _moving(self.micro_batches, self.on_device)

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory."""
        return self.moving * self.place_nbytes

    def explain(self) -> str:
        """Which wait where, and why, in a line for people."""
        if not self.moving:
            return "hidden states of micro-batches that wait stay on the device, where there is room for all of them"
        return (
            f"hidden states of {self.micro_batches - self.moving} waiting micro-batches stay on the device, those of "
            f"{self.moving} wait in {format_nbytes(self.host_nbytes)} of ram: the device has room for {self.on_device}"
        )


def moves(micro_batches: int, on_device: int) -> tuple[bool, ...]:
    """Whether each micro-batch of a pass moves: none where all may be on the device, else all but a fixed set. Those
    that stay are spread evenly, so that the others have time to come and go."""
    moving = _moving(micro_batches, on_device)
    return tuple((n + 1) * moving // micro_batches > n * moving // micro_batches for n in range(micro_batches))


def _moving(micro_batches: int, on_device: int) -> int:
    return 0 if micro_batches <= on_device else micro_batches - max(on_device - IN_TRANSIT, 0)
