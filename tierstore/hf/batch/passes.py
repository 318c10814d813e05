"""One pass under way: micro-batches that go through the layers, each layer's in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.hf.batch.blocks import Blocks
from tierstore.hf.batch.slices import Slice
from tierstore.hf.batch.stream import PROMPT_QUERIES, MicroBatch, Tile, cut
from tierstore.hf.batch.visits import Spans, Visit, plan_visits
from tierstore.hf.batch.writing import Writing
from tierstore.hf.kv.kinds import KvKind
from tierstore.hf.kv.memory import KvMemory
from tierstore.hf.kv.targets import Targets
from tierstore.kernels.paged_attention.tiles import TileAttention
from tierstore.pages import Appended


@dataclass(frozen=True)
class Queries:
    """Tiles as tensors: the row of each query [n, T], 0 for padding, its position, -1 for padding; and of all queries
    that are none where they are in the flat tiles, and their rows."""

    rows: Tensor
    positions: Tensor
    real: Tensor
    into: Tensor

    @classmethod
    def of(cls, tiles: Sequence[Tile], queries: int, device: torch.device) -> Queries:
        """``tiles`` of ``queries`` queries each."""
        first = torch.tensor([[tile.row, tile.position, tile.count] for tile in tiles])
        at = torch.arange(queries)
        there = at < first[:, 2:]
        rows = torch.where(there, first[:, :1] + at, 0)
        real = there.flatten().nonzero()[:, 0]
        positions = torch.where(there, first[:, 1:2] + at, -1)
        return cls(rows.to(device), positions, real.to(device), rows.flatten()[real].to(device))


@dataclass(frozen=True)
class Share:
    """What a micro-batch writes to and reads from the pages of one kind."""

    targets: Targets
    visits: list[Visit]


class Passing:
    """All of a pass: ``micro_batches``, each of up to ``tokens`` tokens of ``slices``.

    ``numbers[kind]`` are the sequences of the slices in the table of that kind, whose lengths were ``starts``, and
    ``appended[kind]`` what the table said of their new positions. ``by_layer``: all micro-batches are expected to go
    through a layer before the next layer. Raises as ``Writing`` does.
    """

    def __init__(
        self,
        memory: KvMemory,
        slices: Sequence[Slice],
        starts: Sequence[int],
        numbers: Sequence[Sequence[int]],
        appended: Sequence[Sequence[Appended]],
        *,
        tokens: int,
        by_layer: bool,
    ) -> None:
        self.memory = memory
        self.order: list[int] = []
        """The micro-batch of each update of a layer until now."""
        self._done = dict.fromkeys(memory.kind_of, 0)
        sure = [start + (len(s.tokens) if s.prompt else 1) for s, start in zip(slices, starts, strict=True)]
        tables = [
            [kind.table.pages(number) for number in mine] for kind, mine in zip(memory.kinds, numbers, strict=True)
        ]
        self.writings = [
            Writing(kind, pages, each, sure) for kind, pages, each in zip(memory.kinds, tables, appended, strict=True)
        ]
        self.blocks = [Blocks(kind, memory.scratch) for kind in memory.kinds]
        self.micro_batches = [
            MicroPass(self, number, each, tables) for number, each in enumerate(cut(slices, starts, tokens))
        ]
        for kind in range(len(memory.kinds)):
            self._expect(kind, by_layer)

    def next_of(self, layer: int) -> int:
        """The micro-batch that goes through ``layer`` next."""
        return self._done[layer]

    def leave(self, layer: int) -> None:
        """A micro-batch went through the attention of ``layer``."""
        self._done[layer] += 1
        if self._done[layer] == len(self.micro_batches):
            self.writings[self.memory.kind_of[layer]].close(layer)

    def finish(self) -> None:
        """The pass is over. Raises ``ModuleError`` when it left out a layer."""
        for layer, done in self._done.items():
            if done < len(self.micro_batches):
                raise ModuleError(
                    f"layer {layer} did not attend in this forward although it keeps keys and values: generate its "
                    f"sequences one by one"
                )
        for writing in self.writings:
            writing.finish()

    def _expect(self, number: int, by_layer: bool) -> None:
        kind = self.memory.kinds[number]
        if not (kind.plan.ram_frames or kind.plan.nvme_slots):
            return  # all pages are in place, always
        reads = [[v.closed for v in each.shares[number].visits if v.closed] for each in self.micro_batches]
        if by_layer:
            kind.pager.expect([(layer, pages) for layer in kind.layers for each in reads for pages in each])
        else:
            kind.pager.expect([(layer, pages) for each in reads for layer in kind.layers for pages in each])


class MicroPass:
    """One micro-batch in a pass: what the cache and the attention of one call of the model do."""

    def __init__(
        self, passing: Passing, number: int, micro_batch: MicroBatch, tables: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        self.micro_batch, self.number = micro_batch, number
        self._passing = passing
        tiles = {queries: list(micro_batch.tiles(queries)) for queries in (1, PROMPT_QUERIES)}
        tiles = {queries: each for queries, each in tiles.items() if each}
        self._queries = {queries: Queries.of(each, queries, passing.memory.device) for queries, each in tiles.items()}
        self.shares = []
        for kind, pages, writing, blocks in zip(
            passing.memory.kinds, tables, passing.writings, passing.blocks, strict=True
        ):
            spans = Spans(micro_batch, pages, kind.table.page_tokens, kind.window)
            visits = plan_visits(tiles, spans, kind.open, most=blocks.most, few=blocks.few)
            self.shares.append(Share(writing.targets(micro_batch), visits))

    def kind_of(self, layer: int) -> KvKind:
        """The kind that a layer belongs to."""
        return self._passing.memory.kinds[self._passing.memory.kind_of[layer]]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write what layer ``layer`` keeps of the tokens: ``keys`` [1, heads, R, key_dim] and ``values``."""
        passing, memory = self._passing, self._passing.memory
        if layer not in memory.kind_of:
            raise ModuleError(f"layer {layer} keeps keys and values although the config of the model says it does not")
        shape, count = self.kind_of(layer).cells.shape, len(self.micro_batch.tokens)
        have = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])
        if have != (1, shape.heads, shape.key_dim, shape.value_dim) or {keys.dtype, values.dtype} != {memory.dtype}:
            raise ModuleError(
                f"layer {layer} makes keys {list(keys.shape)} and values {list(values.shape)} in {keys.dtype}; its "
                f"config says 1 row of {shape.heads} heads x {shape.key_dim} and {shape.value_dim} in {memory.dtype}"
            )
        if passing.next_of(layer) != self.number:
            raise RuntimeError(
                f"micro-batch {self.number} is at layer {layer} where {passing.next_of(layer)} comes next: calls have "
                f"to keep their order at each layer"
            )
        passing.order.append(self.number)
        kind = memory.kind_of[layer]
        new = (part[:, :, :count].transpose(1, 2) for part in (keys, values))
        passing.writings[kind].write(layer, self.shares[kind].targets, *new)

    def attend(self, layer: int, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """[1, R, Hq, value_dim]: attention of ``query`` [1, Hq, R, key_dim], each over its own sequence's keys up to
        its position; 0 for padding."""
        kind = self.kind_of(layer)
        number, shape = self._passing.memory.kind_of[layer], kind.cells.shape
        rows = query[0].transpose(0, 1)
        tiles = {
            queries: TileAttention(
                rows[each.rows],
                each.positions,
                kv_heads=shape.heads,
                value_dim=shape.value_dim,
                scale=scale,
                softcap=softcap,
                window=kind.window,
            )
            for queries, each in self._queries.items()
        }
        for visit in self.shares[number].visits:
            for look, keys, values in self._passing.blocks[number].read(layer, visit):
                tiles[look.queries].add(look.tiles, look.block, keys, values)
        out = query.new_zeros(1, *rows.shape[:2], shape.value_dim)
        for queries, each in self._queries.items():
            found = tiles[queries].result(sinks).flatten(0, 1)
            out[0].index_copy_(0, each.into, found.index_select(0, each.real).to(out.dtype))
        self._passing.leave(layer)
        return out
