"""Divides memory between weights and the KV cache of a batch, where the user does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil

from tierstore.budget import Budget, format_nbytes
from tierstore.errors import PlanError
from tierstore.hf.batch.capacity import capacity_of
from tierstore.hf.batch.slices import Capacity
from tierstore.page_needs import PageNeed, enough_hbm
from tierstore.page_plan import PageKind, PagePlan, build_page_plan

PART = 4
"""The KV cache takes up to one part in so many of a tier: weights that do not stay cost every pass."""

LARGEST_PART = 2
"""It takes up to one part in so many where the longest sequence does not fit otherwise."""


@dataclass(frozen=True, slots=True)
class KvNeeds:
    """What a job can use: ``sequences`` at once, of ``tokens`` in the mean and ``longest_tokens`` at most, prompt and
    text together, in layers of ``kinds``. ``weights_nbytes`` would like to stay in memory beside them."""

    kinds: Sequence[PageKind]
    sequences: int
    tokens: float
    longest_tokens: int
    weights_nbytes: int


@dataclass(frozen=True, slots=True)
class Split:
    """Bytes for weights, ``hbm`` and ``ram``, and for the KV cache beside them; ``reason`` says it in words."""

    hbm: int
    ram: int
    kv_hbm: int
    kv_ram: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Choice:
    kv_hbm: int
    kv_ram: int
    plan: PagePlan
    sequences: int
    longest: bool

    @property
    def worth(self) -> tuple[bool, int, int]:
        return self.longest, self.sequences, -self.kv_hbm - self.kv_ram


def split_budget(needs: KvNeeds, hbm: int, ram: int, kv_nvme: int, *, unified: bool) -> Split:
    """Divide ``hbm`` and ``ram``; ``kv_nvme`` bytes of pages can be on disk besides.

    The KV cache gets what the job can use, up to a quarter of a tier or what the weights leave over, and up to a half
    where one sequence of the longest length needs as much. Pages are in ``ram`` where more sequences can be under way
    then. Raises ``PlanError`` where half of ``hbm`` holds no cache at all; ``needed`` is what ``hbm`` must be.
    """
    if not needs.kinds:
        return Split(hbm, ram, 0, 0, "no layer keeps keys and values in pages: all memory is for weights")
    chosen: _Choice | None = None
    for part in (PART, LARGEST_PART):
        most_hbm = max(hbm // part, hbm - needs.weights_nbytes)
        most_ram = max(ram // part, min(ram, hbm - most_hbm + ram - needs.weights_nbytes))
        choices = list(_choices(needs, most_hbm, most_ram, kv_nvme, unified))
        best = max(choices, key=lambda choice: choice.worth, default=None)
        if best is not None and (chosen is None or best.longest):
            chosen = best
        if chosen is not None and chosen.longest:
            break
    if chosen is None:
        raise _too_small(needs, hbm, ram, kv_nvme, unified)
    return Split(hbm - chosen.kv_hbm, ram - chosen.kv_ram, chosen.kv_hbm, chosen.kv_ram, _reason(needs, chosen))


def check_kv(kinds: Sequence[PageKind], longest_tokens: int, budget: Budget, *, unified: bool) -> None:
    """Raises ``PlanError`` where the bytes that ``budget`` has for a KV cache hold none; ``needed`` is then what
    ``kv_hbm`` must be for a sequence of ``longest_tokens``, so that no row fails for want of it afterwards."""
    try:
        build_page_plan(kinds, budget.kv_hbm, budget.kv_ram, budget.kv_nvme, unified=unified)
    except PlanError as error:
        need = PageNeed(1, longest_tokens)
        enough = enough_hbm(kinds, need, budget.kv_ram, budget.kv_nvme, unified=unified, above=budget.kv_hbm)
        if enough is None:
            raise
        raise PlanError(
            f"{error}; raise Budget.kv_hbm to {enough} bytes for rows of up to {longest_tokens} tokens", needed=enough
        ) from error


def _choices(needs: KvNeeds, most_hbm: int, most_ram: int, kv_nvme: int, unified: bool) -> Iterator[_Choice]:
    for kv_ram in _ram_sizes(most_ram):
        kv_hbm = _least_hbm(needs, kv_ram, kv_nvme, unified)
        while kv_hbm is not None and kv_hbm <= most_hbm:
            plan = build_page_plan(needs.kinds, kv_hbm, kv_ram, kv_nvme, unified=unified)
            sequences = min(needs.sequences, _sequences(capacity_of(plan.kinds), needs.tokens))
            longest = plan.tokens is None or plan.tokens >= needs.longest_tokens
            yield _Choice(kv_hbm, kv_ram, plan, sequences, longest)
            if kv_hbm == most_hbm or (longest and sequences == needs.sequences):
                break
            kv_hbm = min(most_hbm, kv_hbm + kv_hbm // 8 + 1)


def _ram_sizes(most: int) -> list[int]:
    return sorted({0, most // 4, most // 2, most})


def _least_hbm(needs: KvNeeds, kv_ram: int, kv_nvme: int, unified: bool) -> int | None:
    """The smallest ``kv_hbm``; None where ``kv_ram`` is too small for pages on their way to the disk."""
    try:
        build_page_plan(needs.kinds, 0, kv_ram, kv_nvme, unified=unified)
    except PlanError as error:
        with suppress(PlanError):
            build_page_plan(needs.kinds, error.needed, kv_ram, kv_nvme, unified=unified)
            return error.needed
    return None


def _sequences(capacity: Capacity, tokens: float) -> int:
    """How many sequences of ``tokens`` can be under way at once."""
    pages = ceil(tokens / capacity.page_tokens)
    if capacity.sequence_pages is not None:
        pages = min(pages, capacity.sequence_pages)
    return min(capacity.pages // pages, capacity.open_pages)


def _too_small(needs: KvNeeds, hbm: int, ram: int, kv_nvme: int, unified: bool) -> PlanError:
    tried = [_least_hbm(needs, kv_ram, kv_nvme, unified) for kv_ram in _ram_sizes(ram // LARGEST_PART)]
    least = min((nbytes for nbytes in tried if nbytes is not None), default=None)
    if least is None:
        return PlanError(
            f"pages on disk pass through pinned host memory, and half of {format_nbytes(ram)} is too little for it: "
            "raise Budget.ram, or leave kv_nvme out",
            needed=hbm,
        )
    return PlanError(
        f"the KV cache of one sequence takes {format_nbytes(least)} of hbm beside the weights, more than half of "
        f"{format_nbytes(hbm)}: raise Budget.hbm to {LARGEST_PART * least} bytes{_longest(needs, kv_nvme, unified)}, "
        "or choose a KV format of fewer bytes",
        needed=LARGEST_PART * least,
    )


def _longest(needs: KvNeeds, kv_nvme: int, unified: bool) -> str:
    enough = enough_hbm(needs.kinds, PageNeed(1, needs.longest_tokens), 0, kv_nvme, unified=unified)
    if enough is None:
        return ""
    return f", or to {LARGEST_PART * enough} for rows of up to {needs.longest_tokens} tokens"


def _reason(needs: KvNeeds, chosen: _Choice) -> str:
    tiers = f"{format_nbytes(chosen.kv_hbm)} of hbm"
    if chosen.kv_ram:
        tiers += f" and {format_nbytes(chosen.kv_ram)} of ram"
    sequences = "1 sequence" if chosen.sequences == 1 else f"{chosen.sequences} sequences"
    text = f"{tiers} are for the KV cache, room for {sequences} of {needs.tokens:.0f} tokens at once; "
    if chosen.sequences == needs.sequences:
        text += "the job has no more"
    elif chosen.sequences == capacity_of(chosen.plan.kinds).open_pages:
        text += f"the job has {needs.sequences}, but no more pages can be open at once"
    else:
        text += f"the job has {needs.sequences}, but weights that do not stay would cost every pass"
    if not chosen.longest:
        text += (
            f"; rows of more than {chosen.plan.tokens} tokens do not fit, and the longest has {needs.longest_tokens}"
        )
    return text
