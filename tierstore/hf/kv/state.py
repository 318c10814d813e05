"""The rows of one cache, the forward pass that is under way, and what is known of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.hf.kv.kinds import KvKind
from tierstore.hf.kv.memory import KvMemory
from tierstore.hf.kv.passes import Columns, KindPass
from tierstore.hf.kv.reading import Reader
from tierstore.hf.kv.rows import Rows
from tierstore.hf.kv.sources import Known
from tierstore.hf.kv.states import LayerStates, PagedStates


class Passing:
    """A pass under way: what each kind does, and which layers have had their update."""

    def __init__(self, columns: Columns, kinds: Sequence[KindPass], known: Sequence[Known]):
        self.columns, self.kinds = columns, tuple(kinds)
        self.readers = tuple(Reader(kind, each) for kind, each in zip(kinds, known, strict=True))
        self.written: set[int] = set()


class CacheState:
    """The rows of one cache, the pass under way, and what is known of the tokens."""

    def __init__(self, memory: KvMemory) -> None:
        self.memory = memory
        self.rows = Rows(memory.tables)
        self.recording = False
        self.goal = 0
        """Positions that rows may get to have, as far as is known."""
        self.passing: Passing | None = None
        self.stored: Tensor | None = None  # bool [B, columns]; None when all columns of all rows are stored
        self.tokens: Tensor | None = None  # int64 [B, columns], as far as all are known
        self._announced: tuple[Tensor | None, Tensor | None] = (None, None)
        self._known: tuple[Known, ...] = tuple({} for _ in memory.kinds)

    def columns_of(self, layer: int) -> int:
        """Columns that a layer has; in the middle of a pass layers differ."""
        passing = self.passing
        return self.rows.columns if passing is None or layer in passing.written else passing.columns.start

    def first_column(self, layer: int, past: int) -> int:
        """The first column that queries behind ``past`` columns may see in ``layer``."""
        window = self.memory.kinds[self.memory.kind_of[layer]].window
        return 0 if window is None else max(past - window + 1, 0)

    def announce(self, tokens: Tensor | None, mask: Tensor | None) -> None:
        """What the next pass brings: ``tokens`` [B, n], and ``mask`` [B, columns + n], 0 where nothing may be seen."""
        self._announced = (tokens, mask)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """New tokens of a layer, keys [B, heads, n, key_dim] and values; where all are, for attention."""
        memory = self.memory
        kind = memory.kind_of.get(layer)
        if kind is None:
            raise ModuleError(f"layer {layer} keeps keys and values although the config of the model says it does not")
        self._check(keys, values, layer, kind)
        keys, values = keys.to(memory.dtype), values.to(memory.dtype)
        if self.passing is None or layer in self.passing.written:
            self._begin(keys)
        passing = cast(Passing, self.passing)
        passing.kinds[kind].write(layer, keys, values)
        passing.written.add(layer)
        states = LayerStates(self, layer, self.gather)
        length = passing.columns.stop - passing.kinds[kind].first
        shapes = [(*part.shape[:2], length, part.shape[3]) for part in (keys, values)]
        made = (PagedStates.of(states, i, shape, keys.dtype, keys.device) for i, shape in enumerate(shapes))
        return next(made), next(made)

    def kind_of(self, layer: int) -> KvKind:
        """The kind that a layer belongs to."""
        return self.memory.kinds[self.memory.kind_of[layer]]

    def passing_of(self, layer: int) -> KindPass:
        """What a layer's kind does in the pass under way."""
        return self._under_way().kinds[self.memory.kind_of[layer]]

    def reader(self, layer: int) -> Reader:
        """Reads what a layer's queries may see in the pass under way."""
        return self._under_way().readers[self.memory.kind_of[layer]]

    def length_of(self, layer: int) -> int:
        """How many columns a layer's queries may see."""
        passing = self.passing_of(layer)
        return passing.columns.stop - passing.first

    def close(self, layer: int) -> None:
        """Attention of a layer was issued: pack what is full."""
        self.passing_of(layer).close(layer)

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys [B, heads, L, key_dim] and values of a layer that its new tokens may see, in memory of their own."""
        shape, device = self.kind_of(layer).cells.shape, self.memory.device
        size = (len(self.rows), shape.heads, self.length_of(layer))
        keys = torch.empty(*size, shape.key_dim, dtype=self.memory.dtype, device=device)
        values = torch.empty(*size, shape.value_dim, dtype=self.memory.dtype, device=device)
        self.reader(layer).gather(layer, (keys, values))
        return keys, values

    def finish(self) -> None:
        """The pass under way, if any, is over: close what is full, give back what windows have passed."""
        passing, self.passing = self.passing, None
        if passing is None:
            return
        if len(passing.written) < len(self.memory.kind_of):
            self.tokens = None  # some layers were left out: these are no pages for others to find
        for kind in passing.kinds:
            kind.finish()
        if not self.recording:
            self._pass_windows()

    def abandon(self) -> None:
        """The pass under way failed: it never was."""
        passing, self.passing = self.passing, None
        if passing is not None:
            self._crop(passing.columns.start)

    def crop(self, columns: int) -> None:
        """Keep the first ``columns`` columns. Raises ``ValueError`` for what a window has let go of."""
        self.finish()
        for number, kind in enumerate(self.memory.kinds):
            first = self.first_column(kind.layers[0], columns)
            for r, row in enumerate(self.rows.rows):
                index = row.before(first) // kind.table.page_tokens
                if row.before(columns) and self.rows.pages(r, number)[index] < 0:
                    raise ValueError(
                        f"the cache cannot go back from {self.rows.columns} columns to {columns}: pages that the "
                        f"window of {kind.window} tokens needs then are given back; call activate_past_recording first"
                    )
        self._crop(columns)
        self._pass_windows()

    def select(self, sources: Sequence[int]) -> None:
        """Let row ``i`` become what row ``sources[i]`` was."""
        self.finish()
        if list(sources) == list(range(len(self.rows))):
            return
        self.rows.select(sources)
        index = torch.tensor(sources, device=self.memory.device)
        self.stored = None if self.stored is None else self.stored[index]
        self.tokens = None if self.tokens is None else self.tokens[index.to(self.tokens.device)]
        self.memory.forget_freed()

    def clear(self) -> None:
        """Begin anew; what was stored stays findable by content where there is room."""
        self.finish()
        self.rows.clear()
        self.stored = self.tokens = None
        self.recording = False
        self.memory.forget_freed()

    def seal(self) -> None:
        """Let full pages be found by their tokens, as far as these are known."""
        if self.tokens is None or self.tokens.shape[1] < self.rows.columns:
            return
        tokens = self.tokens[:, : self.rows.columns]
        for r in range(len(self.rows)):
            mine = tokens[r] if self.stored is None else tokens[r][self.stored[r].to(tokens.device)]
            self.rows.seal(r, mine.tolist())

    def rewind(self, lost: Iterable[tuple[int, int]]) -> None:
        """Crop to before the first of the ``lost`` cells ``(layer, page)``, or to where windows can go on from."""
        first = self.rows.columns
        for layer, page in lost:
            number = self.memory.kind_of[layer]
            table = self.memory.kinds[number].table
            table.forget(page)
            for r, row in enumerate(self.rows.rows):
                pages = self.rows.pages(r, number)
                if page in pages:
                    first = min(first, row.column(pages.index(page) * table.page_tokens))
        try:
            self.crop(first)
        except ValueError:
            self.crop(0)

    def share(self, tokens: Tensor, mask: Tensor | None, most: int) -> int:
        """Let an empty cache begin with pages that hold the beginnings of ``tokens`` [B, n], ``most`` columns of them
        at most; how many columns it has then."""
        if self.rows.rows:
            return 0
        stored = None if mask is None or bool(mask.all()) else mask.bool()
        if stored is not None and bool((stored.int().diff(dim=1) < 0).any()):
            return 0  # padding that is not in front
        known = [row.tolist() if stored is None else row[stored[r]].tolist() for r, row in enumerate(tokens)]
        self.memory.begin()
        self.rows.add(len(known))
        columns = self.rows.share(known, tokens.shape[1], most)
        if not columns:
            self.rows.clear()
            return 0
        self.tokens = tokens[:, :columns].clone()
        self.stored = None if stored is None else stored[:, :columns].to(self.memory.device)
        return columns

    def enough(self, rows: int, tokens: int, at_once: int = 0) -> str:
        """What to say where ``rows`` rows of up to ``tokens`` positions, or the goal, find no room beside others;
        ``at_once`` of each come in one pass."""
        held = [
            {page for r in range(len(self.rows)) for page in self.rows.pages(r, number) if page >= 0}
            for number in range(len(self.memory.kinds))
        ]
        beside = [kind.table.usage().held_pages - len(mine) for kind, mine in zip(self.memory.kinds, held, strict=True)]
        tokens = max(tokens, self.goal)
        return self.memory.enough(rows, tokens, whole=self.recording, beside=beside, at_once=at_once)

    def pages_of(self, rows: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The closed pages of some rows, of each kind."""
        self.finish()
        return tuple(
            tuple(
                dict.fromkeys(
                    page for r in rows for page in self.rows.pages(r, number) if page >= 0 and page not in kind.open
                )
            )
            for number, kind in enumerate(self.memory.kinds)
        )

    # ---- passes

    def _under_way(self) -> Passing:
        if self.passing is None:
            raise RuntimeError("keys and values of a cache are read after the forward pass that stored them")
        return self.passing

    def _begin(self, keys: Tensor) -> None:
        self.finish()
        memory, rows = self.memory, self.rows
        memory.begin()
        batch, _, count, _ = keys.shape
        new = not rows.rows
        if new:
            rows.add(batch)
        elif len(rows) != batch:
            raise ValueError(f"the cache has {len(rows)} rows and gets {batch}: reset it, or select rows of it first")
        tokens, mask = self._announced
        self._announced = (None, None)
        start = rows.columns
        if tokens is not None and (tuple(tokens.shape) != (batch, count) or (self.tokens is None and start)):
            tokens = None
        try:
            stored, trusted = self._stored(batch, count, mask)
            fresh = None if stored is None else stored[:, start:].tolist()
            same = [tuple(row) for row in tokens.tolist()] if tokens is not None and batch > 1 < count else None
            growth = rows.append(count, fresh, same)
        except BaseException:
            if new:
                rows.clear()
            raise
        try:
            columns = Columns(rows, start, start + count, stored, trusted, memory.device)
            kinds = [
                KindPass(kind, number, rows, columns, growth, self.first_column(kind.layers[0], start))
                for number, kind in enumerate(memory.kinds)
            ]
        except BaseException:
            self._undo(start, bool(any(a.copies for kind in growth.appended for a in kind.values())))
            raise
        self.stored = stored
        if tokens is None or self.tokens is None:
            self.tokens = None if tokens is None else tokens.clone()
        else:
            self.tokens = torch.cat([self.tokens, tokens], 1)
        self.passing = Passing(columns, kinds, self._known)
        for kind, each in zip(memory.kinds, kinds, strict=True):
            kind.pager.expect([(layer, each.closed) for layer in kind.layers])

    def _stored(self, batch: int, count: int, mask: Tensor | None) -> tuple[Tensor | None, bool]:
        """Which columns are stored with ``count`` new ones, and whether ``mask`` hides just the others."""
        start = self.rows.columns
        if mask is None:
            if self.stored is None:
                return None, True
            ones = torch.ones(batch, count, dtype=torch.bool, device=self.memory.device)
            return torch.cat([self.stored, ones], 1), False
        seen = mask.to(self.memory.device, torch.bool)
        if seen.shape[0] != batch or seen.shape[1] < start + count:
            raise ValueError(f"attention_mask is {list(mask.shape)} for {batch} rows of {start + count} columns")
        seen = seen[:, : start + count]
        if bool(seen.all()) and self.stored is None:
            return None, True
        before = self.stored
        if before is None:
            before = torch.ones(batch, start, dtype=torch.bool, device=self.memory.device)
        old = seen[:, :start]
        if bool((old & ~before).any()):
            raise ValueError("attention_mask shows tokens that it hid when they came: they were not stored")
        return torch.cat([before, seen[:, start:]], 1), bool(torch.equal(old, before))

    def _undo(self, start: int, copied: bool) -> None:
        """After a page could not be opened. Rows that were to write to a copy have nowhere to go back to."""
        if copied or not start:
            self.clear()
        else:
            self._crop(start)

    def _crop(self, columns: int) -> None:
        self.rows.crop(columns)
        self.stored = None if self.stored is None else self.stored[:, :columns]
        self.tokens = None if self.tokens is None else self.tokens[:, :columns]
        if not columns:
            self.rows.clear()
            self.stored = self.tokens = None
        self.memory.forget_freed()

    def _pass_windows(self) -> None:
        for number, kind in enumerate(self.memory.kinds):
            if kind.window is not None:
                self.rows.drop_before(number, self.first_column(kind.layers[0], self.rows.columns))
        self.memory.forget_freed()

    def _check(self, keys: Tensor, values: Tensor, layer: int, kind: int) -> None:
        shape, dtype = self.memory.kinds[kind].cells.shape, self.memory.dtype
        have = (keys.shape[1], keys.shape[3], values.shape[3])
        dtypes = {keys.dtype, values.dtype}
        if torch.is_autocast_enabled(keys.device.type):  # which makes fewer bits than pages keep, or as many
            dtypes = {torch.promote_types(each, dtype) for each in dtypes}
        if have != (shape.heads, shape.key_dim, shape.value_dim) or dtypes != {dtype}:
            raise ModuleError(
                f"layer {layer} makes {have[0]} heads of keys x {have[1]} in {keys.dtype} and values x {have[2]} in "
                f"{values.dtype}; its config says {shape.heads} of {shape.key_dim} and {shape.value_dim} in {dtype}: "
                "load it without kv_hbm"
            )
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ModuleError("pages keep no gradients: call the model in torch.no_grad(), or give it another cache")
