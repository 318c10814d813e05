"""Where the hidden states of micro-batches wait while a job runs: room for them, measured, and divided by a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from torch import Tensor

from tierstore.binding.aside import Counted, Waits
from tierstore.composing import UNIT_NBYTES
from tierstore.hf.batch.slices import Slice
from tierstore.jobs.splitting import LARGEST_PART
from tierstore.waiting_plan import SHARE, WaitingPlan, WaitingRoom

if TYPE_CHECKING:
    from tierstore.jobs.probing import Model
    from tierstore.session import Session

WIDTHS = 16
"""Before it is measured, a token is taken to hold so many numbers for each one of its hidden state while it waits."""


@dataclass(frozen=True, slots=True)
class StatesRoom:
    """Bytes for what waiting micro-batches hold: ``device_nbytes`` beside ``hbm``, and ``host_nbytes`` of ``ram``."""

    device_nbytes: int
    host_nbytes: int


def room_for_states(hbm: int, ram: int, *, weights: Collection[int], tokens: float, token_nbytes: int) -> StatesRoom:
    """A fixed share of ``hbm``, and one of ``ram`` where the ``tokens`` of a job, of which each has a hidden state of
    ``token_nbytes``, may need it: where more of them wait at once than there is room for on the device, because
    tensors of ``weights`` bytes are fetched piece by piece, as they do not fit beside a KV cache that takes half.

    What weights pass through on their way from disk is left to them in any case."""
    device_nbytes, weights_nbytes = hbm // SHARE, sum(weights)
    unit_nbytes = max([min(UNIT_NBYTES, hbm // 8), *weights])
    spare = max(ram - 2 * unit_nbytes, 0)
    most = ceil(tokens) * token_nbytes * WIDTHS
    none = most <= device_nbytes or weights_nbytes <= hbm - hbm // LARGEST_PART
    return StatesRoom(device_nbytes, 0 if none else min(ram // SHARE, spare, most))


class HiddenStates:
    """Runs calls of ``session.module`` together. What they hold while they wait is measured, or goes where a plan says.

    ``room`` is None where they compute in host memory: hidden states are in the lower tier already, and stay."""

    def __init__(self, session: Session, room: StatesRoom | None) -> None:
        self._session, self._room = session, room
        self._waits: Waits | None = None

    def together(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """``session.together``."""
        return self._session.together(calls, waits=self._waits)

    def measure(self, model: Model, *, vocabulary: int, positions: int | None) -> WaitingRoom | None:
        """The room in terms of tokens, by a pass of ``model``, which uses ``together``, over two sequences of as many
        tokens as a micro-batch has. None where none waits for weights, or where a pass has only one of a token."""
        room, capacity, before = self._room, model.capacity, model.tokens
        most = min(capacity.pages, max(1, capacity.open_pages)) * capacity.page_tokens
        tokens = min(before, (most if positions is None else min(most, positions)) // 2)
        if room is None or tokens < 1 or not self._session.plan.streamed_nbytes:
            return None
        counted = self._waits = Counted()
        prompt = tuple(number % vocabulary for number in range(tokens))
        sequences = [model.add(prompt)[0] for _ in range(2)]
        try:
            model.tokens = tokens
            model.step([Slice(sequence, prompt, 1, prompt=True) for sequence in sequences])
        finally:
            for sequence in sequences:
                model.remove(sequence)
            model.tokens, self._waits = before, None
        each, moved = ceil(counted.most_nbytes / tokens), ceil(counted.all_nbytes / tokens)
        seconds = 1 / self._session.links.ram_bytes_per_second
        return WaitingRoom(each, moved, room.device_nbytes, room.host_nbytes, seconds)

    def begin(self, plan: WaitingPlan | None) -> None:
        """From now on they wait where ``plan`` says. Raises as ``session.set_aside``."""
        if plan is not None and plan.moving:
            self._waits = self._session.set_aside(plan)
