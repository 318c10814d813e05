"""What a pager holds and has moved, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PagerUsage:
    """Cells by where compute finds them now, bytes moved so far, and what went wrong.

    ``open_cells`` take several frames each; ``hbm_cells``, ``ram_cells`` and ``nvme_cells`` are closed and count once,
    at the nearest place; ``lost_cells`` are besides. Bytes are of whole frames. ``misses``: times that cells
    were asked for which the order had not told of. ``stall_seconds``: the host waited so long for cells.
    """

    open_cells: int
    hbm_cells: int
    ram_cells: int
    nvme_cells: int
    lost_cells: int
    free_frames: int
    frame_nbytes: int
    written_nbytes: int
    read_nbytes: int
    misses: int
    stall_seconds: float

    @property
    def hbm_nbytes(self) -> int:
        """Bytes of closed cells in HBM."""
        return self.hbm_cells * self.frame_nbytes

    @property
    def ram_nbytes(self) -> int:
        """Bytes of cells in RAM."""
        return self.ram_cells * self.frame_nbytes

    @property
    def nvme_nbytes(self) -> int:
        """Bytes of cells in the page store."""
        return self.nvme_cells * self.frame_nbytes
