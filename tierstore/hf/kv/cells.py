"""The bytes of one kind's pages: writing open cells, packing them, and reading closed ones, over the pager's frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from tierstore.contracts import Buffer
from tierstore.hf.kv.moving import movers_for
from tierstore.hf.kv.room import Room, States
from tierstore.hf.kv.runs import even_runs, take
from tierstore.kvformats.format import KvFormat, KvShape
from tierstore.kvformats.plain import Raw
from tierstore.page_kinds import FRAME_ALIGN
from tierstore.page_plan import KindPlan

Frames = tuple[int, ...]


class Cells:
    """Views of ``region``, the HBM frames of one kind of layers, as keys and values of ``dtype``.

    A page of keys is [page_tokens, heads, key_dim], token-major as it is written, of values likewise.
    """

    def __init__(self, plan: KindPlan, shape: KvShape, dtype: torch.dtype, form: KvFormat, region: Buffer) -> None:
        self.shape, self.dtype, self.form = shape, dtype, form
        self.region = cast(Tensor, region)
        self.movers = movers_for(self.region.device)
        """Kernels that move tokens of open cells, or of closed ones that have a ``raw_dtype``; None for torch."""
        self.frame_nbytes = plan.frame_nbytes
        self._open = plan.open
        self._cell_nbytes = plan.kind.cell_nbytes
        self._raw: dict[tuple[int, int], States] = {}  # views, by the buffer
        self.keys = self._pieces(self.region, shape.key_dim, plan.open.offsets[0], plan.frame_nbytes)
        self.values = self._pieces(self.region, shape.value_dim, plan.open.offsets[1], plan.frame_nbytes)

    @property
    def device(self) -> torch.device:
        """Where the frames are."""
        return self.region.device

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page's keys and values in ``dtype``."""
        shape = self.shape
        return shape.page_tokens * shape.heads * (shape.key_dim + shape.value_dim) * self.dtype.itemsize

    @property
    def piece_tokens(self) -> int:
        """Tokens of an open page that stand in one frame."""
        return self._open.piece_tokens

    @property
    def raw_dtype(self) -> torch.dtype | None:
        """The dtype of closed cells that are keys, then values, and nothing else; None for packed ones."""
        return self.form.dtype if isinstance(self.form, Raw) else None

    @property
    def value_offset(self) -> int:
        """Bytes before the values of a closed cell that has a ``raw_dtype``."""
        return self.shape.page_tokens * self.shape.heads * self.shape.key_dim * (self.raw_dtype or self.dtype).itemsize

    def offsets_of(self, frames: Iterable[Frames]) -> tuple[list[list[int]], list[list[int]]]:
        """Of each open cell, at which bytes of the region the pieces of its keys are, and those of its values."""
        size, layout = self.frame_nbytes, self._open
        keys, values = [], []
        for cell in frames:
            at = [layout.keys_at(part) for part in range(layout.parts)]
            keys.append([cell[number] * size + offset for number, offset in at])
            at = [layout.values_at(part) for part in range(layout.parts)]
            values.append([cell[number] * size + offset for number, offset in at])
        return keys, values

    # ---- open cells

    def write(
        self, frames: Sequence[Frames], pieces: Tensor | int, at: Tensor | int, keys: Tensor, values: Tensor
    ) -> None:
        """Write tokens [B, n, heads, dim]: each is at ``at`` of piece ``pieces``, both [B, n], of the open cells in
        ``frames``, where the pieces of the first cell come first. Of a single token they are numbers."""
        keys_in, values_in = self._frames_of(frames)
        if isinstance(pieces, int):
            self.keys[keys_in[pieces], at].copy_(keys[0, 0])
            self.values[values_in[pieces], at].copy_(values[0, 0])
            return
        key_frames = torch.tensor(keys_in, device=self.device)[pieces]
        value_frames = key_frames if values_in == keys_in else torch.tensor(values_in, device=self.device)[pieces]
        self.keys[key_frames, at] = keys
        self.values[value_frames, at] = values

    def open_pages(self, frames: Sequence[Frames], into: States) -> States:
        """Copies of open cells to ``into``, as ``Room.pages`` gives it: keys [n, page_tokens, heads, key_dim] and
        values."""
        numbers = self._frames_of(frames)
        for states, at, target in zip((self.keys, self.values), numbers, into, strict=True):
            take(states, at, target.view(-1, self._open.piece_tokens, *target.shape[2:]))
        return into

    def fill(self, frames: Sequence[Frames], keys: Tensor | float, values: Tensor | float) -> None:
        """Let whole open cells be ``keys`` [n, page_tokens, heads, key_dim] and ``values``, or a number."""
        for states, numbers, new in zip((self.keys, self.values), self._frames_of(frames), (keys, values), strict=True):
            where = torch.tensor(numbers, device=self.device)
            if isinstance(new, Tensor):
                states[where] = new.reshape(len(numbers), *states.shape[1:])
            else:
                states[where] = new

    def pack(self, frames: Sequence[Frames], targets: Sequence[int]) -> None:
        """Pack open cells into the frames ``targets``, as closed ones."""
        packed = torch.empty(len(targets), self._cell_nbytes, dtype=torch.uint8, device=self.device)
        self.form.pack(*self.open_pages(frames, Room(self.shape, self.dtype, self.device).pages(len(frames))), packed)
        rows = self._rows(self.region, self.frame_nbytes)
        for which, places in even_runs(targets):
            rows[places] = packed[which]

    # ---- closed cells

    def raw_pages(self, buffer: Tensor) -> States:
        """Views of ``buffer`` as closed cells that have a ``raw_dtype``, one at each multiple of ``FRAME_ALIGN`` bytes:
        keys [m, page_tokens, heads, key_dim] and values. They overlap."""
        name = (buffer.data_ptr(), buffer.numel())  # of the few buffers of a pager
        found = self._raw.get(name)
        if found is None:
            rows = self._rows(buffer, FRAME_ALIGN)
            found = self._raw[name] = self.form.unpack(rows, self.shape, cast(torch.dtype, self.raw_dtype))
        return found

    def unpack(self, buffer: Tensor, offsets: Sequence[int], dtype: torch.dtype) -> States:
        """The closed cells at bytes ``offsets`` of ``buffer``: keys [n, page_tokens, heads, key_dim] and values, which
        may be views of them."""
        rows = self._rows(buffer, FRAME_ALIGN)
        runs = [rows[places] for _, places in even_runs([offset // FRAME_ALIGN for offset in offsets])]
        return self.form.unpack(runs[0] if len(runs) == 1 else torch.cat(runs), self.shape, dtype)

    def _frames_of(self, frames: Sequence[Frames]) -> tuple[list[int], list[int]]:
        """The frame of each piece of keys, and of values."""
        if self._open.frames == 1:
            numbers = [cell[0] for cell in frames]
            return numbers, numbers
        parts = self._open.parts
        keys = [number for cell in frames for number in cell[:parts]]
        if self._open.pieces_per_frame == 2:
            return keys, keys
        return keys, [number for cell in frames for number in cell[parts:]]

    def _pieces(self, buffer: Tensor, dim: int, offset: int, step: int) -> Tensor:
        """[frames, piece_tokens, heads, dim] in ``dtype``: what stands at byte ``offset`` of each frame."""
        size = self.dtype.itemsize
        shape = (self._open.piece_tokens, self.shape.heads, dim)
        typed = buffer[: buffer.numel() // size * size].view(self.dtype)
        strides = (step // size, self.shape.heads * dim, dim, 1)
        return typed.as_strided((buffer.numel() // step, *shape), strides, typed.storage_offset() + offset // size)

    def _rows(self, buffer: Tensor, step: int) -> Tensor:
        """uint8 [n, cell_nbytes]: row i begins at byte ``i * step``. Rows overlap where ``step`` is small."""
        count = (buffer.numel() - self._cell_nbytes) // step + 1
        return buffer.as_strided((count, self._cell_nbytes), (step, 1), buffer.storage_offset())
