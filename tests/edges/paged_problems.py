"""Decodes over pages that lie anywhere, with what is right: for every way to compute them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from tierstore.kernels.kv_pages import reference as kv_pages
from tierstore.kernels.kv_pages.layout import CODE_BITS, layout_of
from tierstore.kernels.paged_attention import reference
from tierstore.kernels.paged_attention.partial import Partial

Call = Callable[..., Any]
NARROW, HALF, WIDE = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {NARROW: 1e-2, HALF: 2e-3, WIDE: 1e-5}
ALIGN = 64
RAW = "raw"
FORMATS = [RAW, *CODE_BITS]


@dataclass(frozen=True)
class Shape:
    """Of rows, query heads, heads of keys, queries, dims of keys and values, tokens of a page, and pages of a row."""

    rows: int
    query_heads: int
    heads: int
    queries: int
    key_dim: int
    value_dim: int
    page_tokens: int
    pages: int


@dataclass(frozen=True)
class Problem:
    """What a decode is told, and what is right."""

    function: str
    arguments: tuple[Tensor, ...]
    options: dict[str, Any]
    exact: Partial

    def check(self, call: Call) -> None:
        dtype = self.arguments[0].dtype
        found = call("paged_attention.triton", self.function, *self.arguments, **self.options)
        for part, exact in zip(found, self.exact, strict=True):
            assert part.dtype == WIDE
            torch.testing.assert_close(part.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def up(count: int, step: int = ALIGN) -> int:
    return -(-count // step) * step


def spread(pieces: Tensor, generator: Generator, room: int) -> tuple[Tensor, Tensor]:
    """Bytes ``pieces`` [n, nbytes] in any order, ``room`` apart, among others; and where each is."""
    order = torch.randperm(len(pieces) + 2, generator=generator, device=pieces.device)
    buffer = torch.full((len(order), room), 255, dtype=torch.uint8, device=pieces.device)
    buffer[order[2:], : pieces.shape[1]] = pieces
    return buffer.view(-1), order[2:] * room


def as_bytes(states: Tensor) -> Tensor:
    return states.contiguous().view(len(states), math.prod(states.shape[1:])).view(torch.uint8)


def problem(
    form: str, shape: Shape, dtype: torch.dtype, spans: Tensor, *, softcap: float | None = None, device: str = "cpu"
) -> Problem:
    """Random pages in any order, among bytes that are not a number; a row's last page has such ones behind its span."""
    generator = Generator(device).manual_seed(shape.pages + shape.queries)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    count = shape.rows * shape.pages
    keys = normal(count, shape.page_tokens, shape.heads, shape.key_dim)
    values = normal(count, shape.page_tokens, shape.heads, shape.value_dim)
    q = normal(shape.rows, shape.queries, shape.query_heads, shape.key_dim).transpose(1, 2)
    table = (shape.rows, shape.pages)
    sizes: dict[str, Any] = {"heads": shape.heads, "value_dim": shape.value_dim, "scale": 0.4, "softcap": softcap}
    if form == RAW:
        stop = spans[:, 1].long()
        tokens = torch.arange(shape.pages * shape.page_tokens, device=device).expand(shape.rows, -1)
        behind = (tokens >= stop[:, None]).view(count, shape.page_tokens)
        pieces = [as_bytes(part.masked_fill(behind[..., None, None], torch.nan)) for part in (keys, values)]
        width = max(piece.shape[1] for piece in pieces)
        padded = [torch.nn.functional.pad(piece, (0, width - piece.shape[1])) for piece in pieces]
        buffer, places = spread(torch.cat(padded), generator, up(width))
        function, options = "decode_raw", {"dtype": dtype, "piece_tokens": shape.page_tokens, **sizes}
        offsets: tuple[Tensor, ...] = (places[:count].view(table), places[count:].view(table))
    else:
        dims = (shape.heads, shape.page_tokens, shape.key_dim, shape.value_dim)
        layout = layout_of(form, *dims)
        cells = torch.zeros(count, layout.nbytes, dtype=torch.uint8, device=device)
        kv_pages.pack(form, keys, values, cells)
        keys, values = kv_pages.unpack(form, cells, *dims, dtype)
        buffer, places = spread(cells, generator, up(layout.nbytes))
        function, options = "decode", {"page_tokens": shape.page_tokens, "kv_format": form, **sizes}
        offsets = (places.view(table),)
    keys, values = (
        part.reshape(shape.rows, shape.pages * shape.page_tokens, *part.shape[2:]) for part in (keys, values)
    )
    exact = reference.decode(q, keys, values, spans[:, 0], spans[:, 1], scale=0.4, softcap=softcap)
    return Problem(function, (q, buffer, *offsets, spans), options, exact)


def some_spans(shape: Shape, device: str = "cpu") -> Tensor:
    """The first row looks at all tokens, the second at none, the third not at the ends."""
    every = shape.pages * shape.page_tokens
    known = [(0, every), (every // 2, every // 2), (every // 3, every - 1)]
    return torch.tensor(known[: shape.rows], dtype=torch.int32, device=device).view(shape.rows, 2)
