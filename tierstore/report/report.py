"""What a session did, in numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from tierstore.report.kv import KvReport
from tierstore.report.render import as_text
from tierstore.report.waiting import WaitingReport


@dataclass(frozen=True, slots=True)
class LinkReport:
    """Traffic over one link, such as ``"nvme->hbm"``.

    ``seconds`` is the time during which at least one move was under way, so moves that overlap do
    not count twice and ``bytes_per_second`` is what the link achieved while it was busy.
    """

    nbytes: int
    seconds: float
    moves: int

    @property
    def bytes_per_second(self) -> float:
        """Achieved rate; 0 when nothing moved."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """One session so far: bytes are weight bytes, times are seconds of the host's clock.

    ``peak_bytes`` has the keys ``"hbm"``, ``"ram"`` and ``"nvme"``: the most each tier held at any
    moment (``"nvme"``: written below ``store=``). ``links`` is traffic by link. ``stall_seconds`` is
    how long compute waited for each unit that it waited for. ``misses`` counts uses that the order
    did not expect. ``resident_share`` is the part of the weights, 0 to 1, that never moves again.
    ``passes`` counts complete rounds over the units, ``seconds`` the wall time since the session
    opened. ``notes`` are decisions worth knowing, such as a fallback and its reason. ``kv`` is the KV cache,
    None where the session has none, and ``waiting`` the host memory for what micro-batches hold; their bytes are not
    among those of ``peak_bytes`` and ``links``.

    ``str()`` gives a table for people, ``to_json()`` one line for programs.
    """

    peak_bytes: Mapping[str, int]
    links: Mapping[str, LinkReport]
    stall_seconds: Mapping[str, float]
    misses: int
    resident_share: float
    passes: int
    seconds: float
    notes: tuple[str, ...] = ()
    kv: KvReport | None = None
    waiting: WaitingReport | None = None

    @property
    def bytes_moved(self) -> int:
        """Weight bytes that crossed links; bytes that cross two links count on both."""
        return sum(link.nbytes for link in self.links.values())

    def to_json(self) -> str:
        """One line of JSON with every field, ``bytes_moved`` and each link's ``bytes_per_second``."""
        fields = asdict(self) | {"bytes_moved": self.bytes_moved}
        fields["links"] = {
            name: asdict(link) | {"bytes_per_second": link.bytes_per_second} for name, link in self.links.items()
        }
        return json.dumps(fields)

    def __str__(self) -> str:
        return as_text(self)
