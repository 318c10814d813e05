"""Divides the bytes of a KV budget: frames for pages, a ring that streams, room to work, and what lies below.

A *cell* is one page in one layer: open while tokens are written to it, closed once it is packed. HBM is cut into equal
*frames*, each of a closed cell. Which cells stay there is a fixed set, a quota a layer, since layers are visited in a
cycle: a cache that evicts the least recently used would evict just what is read next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tierstore.budget import format_nbytes
from tierstore.errors import PlanError
from tierstore.extents import align_up
from tierstore.page_kinds import FRAME_ALIGN, OpenLayout, PageKind, lay_out_open
from tierstore.page_shares import page_shares

__all__ = ["KindPlan", "OpenLayout", "PageKind", "PagePlan", "build_page_plan"]

SECTOR = 4096
"""What a disk reads and writes at once, in bytes."""

RING_NBYTES = 32 << 20
"""Bytes on their way to HBM, or to a disk, that keep a link busy: a ring is no larger."""

LITTLE_NBYTES = 8 << 20
"""Of HBM for one kind of layers: where there is more, a ring may be a third of that for speed, else a quarter."""

SCRATCH_NBYTES = 32 << 20
"""Unpacked bytes that attention works on at once: more would not be faster."""

OPEN_PAGES = 64
"""Open pages that residents make room for at most: how many a long prompt can write in one pass."""


@dataclass(frozen=True, slots=True)
class KindPlan:
    """How the layers of one kind use memory. Counts are of cells, summed over the layers, unless they say otherwise.

    ``frames`` of ``frame_nbytes`` are in HBM: an open cell takes ``open.frames`` of them, a closed one takes one.
    Closed cells beyond ``quota`` a layer go to one of ``ram_frames`` frames in RAM, or to one of ``nvme_slots``
    on disk, in runs of ``run_cells``. What is not read in place passes through ``ring_slots`` runs in HBM, and on
    its way from or to the disk through ``staging_slots`` runs of pinned host memory (a ``unified`` device needs none).
    ``open_pages`` can be open at once beside a full quota, which may be exceeded while fewer are. ``pages`` is what a
    ``PageTable`` may number: so many have room when one sequence is being written; each page that is open besides costs
    ``open.frames - 1`` more.
    """

    kind: PageKind
    open: OpenLayout
    frame_nbytes: int
    frames: int
    quota: int
    open_pages: int
    run_cells: int
    ring_slots: int
    staging_slots: int
    ram_frames: int
    nvme_slots: int
    pages: int

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a slot of the ring or of the staging: a run, padded to whole sectors where that is little."""
        return _slot_nbytes(self.run_cells, self.frame_nbytes)

    @property
    def region_nbytes(self) -> int:
        """HBM bytes of the frames."""
        return self.frames * self.frame_nbytes

    @property
    def ring_nbytes(self) -> int:
        """HBM bytes of the ring."""
        return self.ring_slots * self.slot_nbytes

    @property
    def ram_nbytes(self) -> int:
        """Host bytes of the frames in RAM."""
        return self.ram_frames * self.frame_nbytes

    @property
    def staging_nbytes(self) -> int:
        """Host bytes between disk and device."""
        return self.staging_slots * self.slot_nbytes

    @property
    def nvme_nbytes(self) -> int:
        """Bytes of the page file, each run in whole sectors."""
        return self.nvme_slots // self.run_cells * align_up(self.run_cells * self.frame_nbytes, SECTOR)

    @property
    def tier_pages(self) -> tuple[int, int, int]:
        """Pages that rest in HBM, in RAM and on disk when all are full: together ``pages``."""
        layers = len(self.kind.layers)
        ram, nvme = self.ram_frames // layers, self.nvme_slots // self.run_cells // layers * self.run_cells
        return self.pages - ram - nvme, ram, nvme


@dataclass(frozen=True, slots=True)
class PagePlan:
    """One plan a kind, in the order of the kinds. ``scratch_nbytes`` of HBM are one piece of memory for all of them,
    since layers run one after another: what attention unpacks pages to."""

    kinds: tuple[KindPlan, ...]
    scratch_nbytes: int

    @property
    def hbm_nbytes(self) -> int:
        """All HBM bytes: frames, rings and scratch."""
        return self.scratch_nbytes + sum(kind.region_nbytes + kind.ring_nbytes for kind in self.kinds)

    @property
    def ram_nbytes(self) -> int:
        """All pinned host bytes: frames and staging."""
        return sum(kind.ram_nbytes + kind.staging_nbytes for kind in self.kinds)

    @property
    def nvme_nbytes(self) -> int:
        """All bytes on disk."""
        return sum(kind.nvme_nbytes for kind in self.kinds)

    @property
    def tokens(self) -> int | None:
        """Positions that one sequence can have; None where every layer has a window and there is no end."""
        bound = [
            plan.pages * plan.kind.page_tokens
            for plan in self.kinds
            if plan.kind.sequence_pages is None or plan.pages < plan.kind.sequence_pages
        ]
        return min(bound, default=None)

    def explain(self) -> str:
        """What fits where, in a few lines for people."""
        fits = "as long as it likes" if self.tokens is None else f"up to {self.tokens} tokens"
        lines = [f"KV cache of {format_nbytes(self.hbm_nbytes)} in hbm: one sequence can be {fits}"]
        for plan in self.kinds:
            kind, layers = plan.kind, len(plan.kind.layers)
            what = "1 layer" if layers == 1 else f"{layers} layers"
            window = "" if kind.window is None else f" with a window of {kind.window} tokens"
            nbytes = kind.page_nbytes
            lines.append(f"  {what}{window}: a page of {kind.page_tokens} tokens is {format_nbytes(nbytes)} in all")
            for tier, pages in zip(("hbm", "ram", "nvme"), plan.tier_pages, strict=True):
                if pages:
                    size = format_nbytes(pages * nbytes)
                    lines.append(f"    {tier:<5}{pages * kind.page_tokens} tokens in {pages} pages, {size}")
            if plan.ring_slots:
                lines.append(f"    ring {plan.ring_slots} runs of {plan.run_cells} pages of a layer")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one kind may use: bytes of each tier."""

    hbm: int
    ram: int
    nvme: int


@dataclass(frozen=True, slots=True)
class _Need:
    """What one kind cannot do without.

    ``spills``: cells leave HBM; ``streams``: they must come back to it; ``stages``: through pinned host memory.
    ``spare`` frames a layer are for packed cells beside the raw ones that they are made from: one for each open page,
    since the layers of a page close one after another."""

    kind: PageKind
    open: OpenLayout
    spills: bool
    streams: bool
    stages: bool

    @property
    def spare(self) -> int:
        return 0 if self.kind.plain else -(-self.kind.sequence_open_pages // len(self.kind.layers))

    def layer_frames(self, run_cells: int) -> int:
        """The fewest frames a layer: a sequence being written, and a run that waits to go down or is going."""
        return self.kind.sequence_open_pages * self.open.frames + self.spare + (run_cells if self.spills else 0)

    @property
    def hbm(self) -> int:
        ring = 2 * _slot_nbytes(1, self.kind.frame_nbytes) if self.streams else 0
        return self.layer_frames(1) * self.kind.page_nbytes + ring

    @property
    def ram(self) -> int:
        return 2 * _slot_nbytes(1, self.kind.frame_nbytes) if self.stages else 0


def build_page_plan(
    kinds: Sequence[PageKind], kv_hbm: int, kv_ram: int, kv_nvme: int, *, unified: bool, run_nbytes: int = 1 << 20
) -> PagePlan:
    """Divide ``kv_hbm``, ``kv_ram`` and ``kv_nvme`` bytes among ``kinds``, as a pure function of its arguments.

    On a ``unified`` device compute reads host memory in place. Cells go down in runs of at least ``run_nbytes``, as
    far as a quarter of a layer's frames and of what lies below allow. No tier is ever used beyond its bytes.

    Beyond what each kind cannot do without, kinds share every tier as ``page_shares`` says.

    Raises ``PlanError`` when ``kv_hbm`` cannot hold one sequence's open pages, a ring of two runs and the scratch of
    one page, or ``kv_ram`` the staging that ``kv_nvme`` needs; ``needed`` is the smallest ``kv_hbm`` that would do.
    Raises ``ValueError`` for kinds that share a layer, or none.
    """
    layers = [layer for kind in kinds for layer in kind.layers]
    if not kinds or len(set(layers)) != len(layers):
        raise ValueError(f"layers {layers} of {len(kinds)} kinds: at least one kind is needed, and a layer is of one")
    if min(kv_ram, kv_nvme) < 0 or run_nbytes < 1:
        raise ValueError(f"kv_ram={kv_ram}, kv_nvme={kv_nvme} and run_nbytes={run_nbytes} must not be negative or 0")
    needs = [
        _Need(
            kind=kind,
            open=lay_out_open(kind),
            spills=bool(kv_ram or kv_nvme),
            streams=bool(kv_nvme or (kv_ram and not unified)),
            stages=bool(kv_nvme and not unified),
        )
        for kind in kinds
    ]
    smallest_scratch = max(2 * kind.raw_nbytes for kind in kinds)
    _refuse_what_cannot_fit(needs, smallest_scratch, kv_hbm, kv_ram)

    hbm, ram = sum(need.hbm for need in needs), sum(need.ram for need in needs)
    useful = min(kv_hbm // 8, kv_hbm - hbm, _useful_scratch(kinds, kv_hbm))
    scratch = max(smallest_scratch, useful // FRAME_ALIGN * FRAME_ALIGN)
    weights = page_shares(kinds, kv_hbm + kv_ram + kv_nvme)
    shares = [
        _Share(need.hbm + more_hbm, need.ram + more_ram, nvme)
        for need, more_hbm, more_ram, nvme in zip(
            needs,
            _divide(kv_hbm - scratch - hbm, weights),
            _divide(kv_ram - ram, weights),
            _divide(kv_nvme, weights),
            strict=True,
        )
    ]
    return PagePlan(
        tuple(_plan_kind(need, share, run_nbytes) for need, share in zip(needs, shares, strict=True)), scratch
    )


def _refuse_what_cannot_fit(needs: Sequence[_Need], scratch: int, kv_hbm: int, kv_ram: int) -> None:
    hbm, ram = scratch + sum(need.hbm for need in needs), sum(need.ram for need in needs)
    if kv_hbm < hbm:
        layers = sum(len(need.kind.layers) for need in needs)
        ring = ", a ring of two runs" if needs[0].streams else ""
        raise PlanError(
            f"a KV cache of {layers} layers needs {format_nbytes(hbm)} of hbm for the pages that one sequence writes "
            f"to{ring} and room to work on one page, Budget.kv_hbm is {format_nbytes(kv_hbm)}: raise Budget.kv_hbm to "
            f"{hbm} bytes, or choose a KV format of fewer bytes",
            needed=hbm,
        )
    if kv_ram < ram:
        raise PlanError(
            f"pages pass through {format_nbytes(ram)} of pinned host memory on their way from and to the disk, "
            f"Budget.kv_ram is {format_nbytes(kv_ram)}: raise Budget.kv_ram to {ram} bytes, or set Budget.kv_nvme to 0",
            needed=hbm,
        )


def _useful_scratch(kinds: Sequence[PageKind], kv_hbm: int) -> int:
    """Room for all pages of a layer that HBM can hold, as float32, as far as more at once is faster."""
    pages = kv_hbm // sum(kind.page_nbytes for kind in kinds)
    return min(SCRATCH_NBYTES, max(2 * kind.raw_nbytes for kind in kinds) * pages)


def _divide(nbytes: int, weights: Sequence[int]) -> Iterator[int]:
    return (nbytes * weight // sum(weights) for weight in weights)


def _plan_kind(need: _Need, share: _Share, run_nbytes: int) -> KindPlan:
    kind, layers, frame_nbytes = need.kind, len(need.kind.layers), need.kind.frame_nbytes
    quarters = [share.hbm // need.kind.page_nbytes - need.layer_frames(0)]
    quarters += [share.ram // frame_nbytes] if need.stages else []
    quarters += [share.nvme // need.kind.page_nbytes] if share.nvme else []
    run_cells = max(1, min(-(-run_nbytes // frame_nbytes), *(most // 4 for most in quarters))) if need.spills else 1
    slot_nbytes = _slot_nbytes(run_cells, frame_nbytes)

    staging_slots = max(2, min(share.ram // 4, RING_NBYTES) // slot_nbytes) if need.stages else 0
    ram_frames = (share.ram - staging_slots * slot_nbytes) // frame_nbytes
    nvme_slots = share.nvme // align_up(run_cells * frame_nbytes, SECTOR) * run_cells

    least = need.layer_frames(run_cells)
    useful = max(share.hbm // 4, (share.hbm - LITTLE_NBYTES) // 3)
    room = min(useful, share.hbm - least * need.kind.page_nbytes, RING_NBYTES)
    ring_slots = max(2, room // slot_nbytes) if need.streams else 0
    frames = (share.hbm - ring_slots * slot_nbytes) // frame_nbytes
    layer_frames = frames // layers
    kept = layer_frames - need.spare - (run_cells if need.spills else 0)
    if need.spills or need.open.frames > 1:
        open_pages = max(kind.sequence_open_pages, min(layer_frames // 4 // need.open.frames, OPEN_PAGES))
    else:
        open_pages = kept  # an open page takes no more than a closed one, and closed ones stay anyway
    below = ram_frames // layers + nvme_slots // run_cells // layers * run_cells
    return KindPlan(
        kind=kind,
        open=need.open,
        frame_nbytes=frame_nbytes,
        frames=frames,
        quota=kept - open_pages * need.open.frames,
        open_pages=open_pages,
        run_cells=run_cells,
        ring_slots=ring_slots,
        staging_slots=staging_slots,
        ram_frames=ram_frames,
        nvme_slots=nvme_slots,
        pages=kept - kind.sequence_open_pages * (need.open.frames - 1) + below,
    )


def _slot_nbytes(cells: int, frame_nbytes: int) -> int:
    nbytes = cells * frame_nbytes
    return align_up(nbytes, SECTOR) if nbytes >= 16 * SECTOR else nbytes
