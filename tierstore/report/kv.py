"""What a KV cache holds and has moved, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tierstore.budget import format_nbytes


@dataclass(frozen=True, slots=True)
class KvReport:
    """The KV cache of a session now, all layers together. A page that sequences share counts once.

    ``tokens`` are positions that stand in pages of sequences, ``unused_tokens`` the rest of these pages;
    ``kept_pages`` belong to no sequence any more and are found by what they hold. ``hbm_nbytes``, ``ram_nbytes`` and
    ``nvme_nbytes`` are bytes of full pages by where they are now. ``written_nbytes`` went to disk so far,
    ``read_nbytes`` came from RAM or disk to compute. ``misses``: reads that nothing had foretold.
    ``lost_cells``: pages of a layer that the disk did not give back as they were. ``stall_seconds``: compute waited.
    """

    held_pages: int
    kept_pages: int
    free_pages: int
    tokens: int
    unused_tokens: int
    hbm_nbytes: int
    ram_nbytes: int
    nvme_nbytes: int
    written_nbytes: int
    read_nbytes: int
    misses: int
    lost_cells: int
    stall_seconds: float

    def lines(self) -> Iterator[str]:
        """For people."""
        tiers = {"hbm": self.hbm_nbytes, "ram": self.ram_nbytes, "nvme": self.nvme_nbytes}
        where = ", ".join(f"{format_nbytes(nbytes)} in {tier}" for tier, nbytes in tiers.items() if nbytes)
        yield (
            f"kv: {self.held_pages} pages held, {self.kept_pages} kept, {self.free_pages} free; {self.tokens} tokens, "
            f"room for {self.unused_tokens} more in their pages" + (f"; full pages: {where}" if where else "")
        )
        yield (
            f"kv: {format_nbytes(self.read_nbytes)} read back, {format_nbytes(self.written_nbytes)} written to disk, "
            f"waited {self.stall_seconds:.2f} s, misses: {self.misses}, lost: {self.lost_cells}"
        )
