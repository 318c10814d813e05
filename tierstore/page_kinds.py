"""Layers whose pages are alike, and where the tokens of an open page stand in frames of HBM."""

from __future__ import annotations

from dataclasses import dataclass

from tierstore.extents import align_up

FRAME_ALIGN = 64
"""Bytes that every frame starts at a multiple of."""


@dataclass(frozen=True, slots=True)
class PageKind:
    """``layers`` with the same KV shape and the same ``window`` (tokens that a query sees; None is all).

    A closed cell is ``cell_nbytes``. An open one has ``raw_key_nbytes_per_token`` and ``raw_value_nbytes_per_token``
    of one layer, in the model's dtype. ``plain``: a closed cell is its raw bytes, so that closing moves nothing.
    ``recent_tokens`` at least, the newest of a sequence, are in open pages. Raises ``ValueError``.
    """

    layers: tuple[int, ...]
    window: int | None
    page_tokens: int
    cell_nbytes: int
    raw_key_nbytes_per_token: int
    raw_value_nbytes_per_token: int
    plain: bool
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        sizes = (self.page_tokens, self.cell_nbytes, self.raw_key_nbytes_per_token, self.raw_value_nbytes_per_token)
        if not self.layers or min(sizes) < 1 or (self.window is not None and self.window < 1) or self.recent_tokens < 0:
            raise ValueError(f"{self}: layers are needed, and every size must be positive")
        if self.plain and self.cell_nbytes != self.raw_nbytes:
            raise ValueError(f"{self}: a plain cell is its {self.raw_nbytes} raw bytes, not {self.cell_nbytes}")

    @property
    def frame_nbytes(self) -> int:
        """Bytes of a frame: a closed cell, padded."""
        return align_up(self.cell_nbytes, FRAME_ALIGN)

    @property
    def page_nbytes(self) -> int:
        """Bytes of a closed page in all layers."""
        return len(self.layers) * self.frame_nbytes

    @property
    def raw_nbytes(self) -> int:
        """Bytes of a cell's tokens in the model's dtype."""
        return self.page_tokens * (self.raw_key_nbytes_per_token + self.raw_value_nbytes_per_token)

    @property
    def sequence_open_pages(self) -> int:
        """Pages of one sequence that are open at once while it grows: the recent ones, the last, and the next."""
        return 2 + -(-self.recent_tokens // self.page_tokens)

    @property
    def sequence_pages(self) -> int | None:
        """Pages that a sequence holds at most, however long it is; None without a window."""
        if self.window is None:
            return None
        return max(2 + -(-self.window // self.page_tokens), self.sequence_open_pages)


@dataclass(frozen=True, slots=True)
class OpenLayout:
    """How an open cell is cut into pieces of ``piece_tokens`` tokens, so that each stands in a frame.

    Keys are ``parts`` pieces and values are, token-major: a piece is [piece_tokens, kv_heads, dim]. With 2
    ``pieces_per_frame``, frame i has keys i at byte ``offsets[0]`` and values i at ``offsets[1]``. With 1, the first
    ``parts`` frames have the keys and the others the values, each at byte 0.
    """

    parts: int
    piece_tokens: int
    pieces_per_frame: int
    offsets: tuple[int, int]

    @property
    def frames(self) -> int:
        """Frames of an open cell."""
        return 2 * self.parts // self.pieces_per_frame

    def keys_at(self, part: int) -> tuple[int, int]:
        """Which of the cell's frames has part ``part`` of the keys, and at which byte of it."""
        return part, self.offsets[0]

    def values_at(self, part: int) -> tuple[int, int]:
        """Which of the cell's frames has part ``part`` of the values, and at which byte of it."""
        return (part if self.pieces_per_frame == 2 else self.parts + part), self.offsets[1]


def lay_out_open(kind: PageKind) -> OpenLayout:
    """The fewest pieces that frames of ``kind`` can hold. A plain cell is one frame, which closing leaves as it is.

    Raises ``ValueError`` where ``page_tokens`` cannot be halved often enough.
    """
    parts, tokens = 1, kind.page_tokens
    while tokens * max(kind.raw_key_nbytes_per_token, kind.raw_value_nbytes_per_token) > kind.frame_nbytes:
        if tokens % 2:
            raise ValueError(
                f"{kind.page_tokens} tokens of {kind.raw_nbytes} raw bytes cannot be cut into powers of two that fit "
                f"frames of {kind.frame_nbytes} bytes: use pages of a power of two tokens, and of more"
            )
        parts, tokens = 2 * parts, tokens // 2
    keys, values = tokens * kind.raw_key_nbytes_per_token, tokens * kind.raw_value_nbytes_per_token
    if keys + values <= kind.frame_nbytes:
        return OpenLayout(parts, tokens, 2, (0, keys))
    return OpenLayout(parts, tokens, 1, (0, 0))
