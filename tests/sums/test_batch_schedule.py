"""Laws of a batch's schedule, over the real page table: every row ends, within every limit."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.batch_schedule import Admission, Limits, Part, Running, Waiting, admit, next_pass, page_keys, too_long
from tierstore.pages import PageTable


@dataclass
class Row:
    """``ends`` says after how many new tokens each sample is over."""

    tokens: list[int]
    new_tokens: int
    ends: list[int]


@dataclass
class Live:
    running: Running
    tokens: list[int]
    ends: list[int]
    generated: int = 0
    offered: int = 0


@dataclass
class Machine:
    """Carries out what is scheduled, on a page table without a model; ``dice`` accept drafts."""

    limits: Limits
    rows: list[Row]
    dice: Random
    drafts: int = 0
    seals_early: bool = True
    live: list[Live] = field(default_factory=list)
    window: int | None = None
    passes: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    computed: int = 0

    def __post_init__(self) -> None:
        self.table = PageTable(self.limits.pages, self.limits.page_tokens)
        self.waiting = deque(
            Waiting(
                number, len(row.tokens), row.new_tokens, len(row.ends), page_keys(row.tokens, self.table.page_tokens)
            )
            for number, row in enumerate(self.rows)
        )
        self.ends = {number: list(row.ends) for number, row in enumerate(self.rows)}

    def run(self) -> None:
        while self.waiting or self.live:
            self.join()
            parts = next_pass([each.running for each in self.live], self.limits)
            assert parts, "nothing goes on although rows are left"
            self.carry_out(parts)

    def join(self) -> None:
        for found in admit([each.running for each in self.live], self.waiting, self.limits):
            row = next(each for each in self.waiting if each.row == found.row)
            at = self.waiting.index(row)
            del self.waiting[at]
            if found.samples < row.samples:
                self.waiting.insert(at, replace(row, samples=row.samples - found.samples))
            tokens = self.rows[row.row].tokens
            sequence = self.table.add()
            length = self.table.share_prefix(sequence, tokens)
            if self.window is not None:
                self.table.drop_before(sequence, max(length - self.window + 1, 0))
            assert length >= found.found
            ends = [self.ends[row.row].pop() for _ in range(found.samples)]
            running = Running(
                sequence, row.row, len(tokens), row.new_tokens, length, found.samples, row.keys, sealed=length
            )
            self.live.append(Live(running, tokens, ends))
        assert sum(each.running.samples for each in self.live) <= self.limits.sequences

    def carry_out(self, parts: list[Part]) -> None:
        assert sum(part.tokens for part in parts) <= self.limits.tokens * self.limits.micro_batches
        assert len({part.sequence for part in parts}) == len(parts)
        assert [part.prompt for part in parts] == sorted(part.prompt for part in parts)
        self.passes.append(sum(part.tokens for part in parts))
        by_number = {each.running.sequence: each for each in self.live}
        opened = {page for each in self.live for page in self.last_page(each)}
        for part in parts:
            each = by_number[part.sequence]
            opened |= {run.page for run in self.table.append(part.sequence, part.tokens).runs}
            opened |= set(self.last_page(each))
            assert part.prompt == (each.running.length < each.running.prompt_tokens)
            if part.prompt:
                assert each.running.length + part.tokens <= each.running.prompt_tokens
            else:
                assert part.tokens <= 1 + each.running.drafts
            each.running = replace(each.running, length=each.running.length + part.tokens)
            self.computed += part.tokens
        assert len(opened) <= self.limits.open_pages
        for part in parts:
            self.grow(by_number[part.sequence], part)
            self.pass_window(part)

    def pass_window(self, part: Part) -> None:
        """As a model does whose layers all have a window: drafted tokens of the last pass can be taken back."""
        if self.window is not None:
            margin = 0 if part.prompt else part.tokens
            for each in self.live:
                if each.running.sequence == part.sequence:
                    length = self.table.length(part.sequence)
                    self.table.drop_before(part.sequence, max(length - margin - self.window + 1, 0))

    def last_page(self, each: Live) -> list[int]:
        """The page that is open between passes."""
        pages, full = divmod(self.table.length(each.running.sequence), self.table.page_tokens)
        return [self.table.pages(each.running.sequence)[pages]] if full else []

    def grow(self, each: Live, part: Part) -> None:
        running = each.running
        if part.prompt:
            done = running.length == running.prompt_tokens
            if done or self.seals_early:
                self.table.seal(running.sequence, each.tokens[: running.length])
                each.running = replace(running, sealed=running.length)
            if done:
                self.fork(each)
            return
        accepted = self.dice.randint(0, part.tokens - 1)
        length = running.length - (part.tokens - 1 - accepted)
        self.table.crop(running.sequence, length)
        each.running = replace(running, length=length)
        each.generated += 1 + accepted
        assert each.generated <= running.new_tokens
        self.settle(each)

    def fork(self, each: Live) -> None:
        at = self.live.index(each)
        ends, each.ends = each.ends, each.ends[:1]
        each.running = replace(each.running, samples=1)
        more = [
            Live(replace(each.running, sequence=self.table.fork(each.running.sequence)), each.tokens, [end])
            for end in ends[1:]
        ]
        self.live[at + 1 : at + 1] = more
        for one in (each, *more):
            one.generated = 1
            self.settle(one)

    def settle(self, each: Live) -> None:
        if each.generated >= min(each.ends[0], each.running.new_tokens):
            self.table.remove(each.running.sequence)
            self.live.remove(each)
            self.ended.append(each.running.row)
        else:
            each.running = replace(each.running, drafts=self.dice.randint(0, self.drafts))


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    size = draw(st.sampled_from([1, 2, 4, 8]))
    begin = [list(range(1, 1 + draw(st.integers(0, 3 * size)))) for _ in range(2)]
    rows = []
    for number in range(draw(st.integers(1, 12))):
        own = [100 + draw(st.integers(0, 2))] * draw(st.integers(1, 3 * size)) + [number] * draw(st.integers(0, 1))
        new = draw(st.integers(1, 2 * size + 2))
        ends = draw(st.lists(st.integers(1, new), min_size=1, max_size=4))
        rows.append(Row(draw(st.sampled_from(begin)) + own, new, ends))
    longest = max(-(-(len(row.tokens) + row.new_tokens) // size) for row in rows)
    limits = Limits(
        tokens=draw(st.sampled_from([1, 2, 8, 32])),
        micro_batches=draw(st.integers(1, 3)),
        sequences=draw(st.integers(1, 8)),
        page_tokens=size,
        pages=longest + draw(st.integers(0, 3 * longest)),
        open_pages=draw(st.integers(1, 10)),
    )
    return Machine(
        limits,
        rows,
        Random(draw(st.integers(0, 99))),
        drafts=draw(st.sampled_from([0, 5])),
        seals_early=draw(st.booleans()),
    )


@st.composite
def windowed(draw: st.DrawFn) -> Machine:
    """Long rows over pages of which there are about as many as a few windows take."""
    size, window = draw(st.sampled_from([2, 4, 8])), draw(st.integers(1, 20))
    most = 2 + -(-window // size)
    rows = []
    for number in range(draw(st.integers(1, 8))):
        tokens = [*range(draw(st.integers(0, 30))), *[100 + number] * draw(st.integers(1, 40))]
        new = draw(st.integers(1, 3 * size))
        rows.append(Row(tokens, new, draw(st.lists(st.integers(1, new), min_size=1, max_size=3))))
    open_pages = draw(st.integers(1, 10))
    limits = Limits(
        tokens=draw(st.sampled_from([1, 8, 32])),
        micro_batches=draw(st.integers(1, 3)),
        sequences=draw(st.integers(1, 6)),
        page_tokens=size,
        pages=most + draw(st.integers(0, 3 * most)),
        open_pages=open_pages,
        sequence_pages=most,
    )
    return Machine(limits, rows, Random(draw(st.integers(0, 99))), drafts=draw(st.sampled_from([0, 1])), window=window)


@settings(max_examples=60, deadline=None)
@given(machine=windowed())
def test_rows_longer_than_all_windows_end_in_the_pages_of_a_window(machine: Machine) -> None:
    machine.run()  # the page table raises where a sequence holds more than was reserved
    assert sorted(machine.ended) == sorted(number for number, row in enumerate(machine.rows) for _ in row.ends)
    assert machine.table.usage().held_pages == 0


def test_a_row_counts_as_many_pages_as_a_window_takes() -> None:
    windows = replace(limits(pages=12), sequence_pages=5)
    assert too_long(Waiting(1, 4000, 100), windows) is None
    assert [each.row for each in admit([], [Waiting(n, 4000, 100) for n in range(3)], windows)] == [0, 1]
    assert [each.row for each in admit([], [Waiting(n, 10, 2) for n in range(5)], windows)] == [0, 1, 2, 3]
    # a long prompt may open pages that nobody has reserved, and no more
    assert next_pass([begun(0, 0, prompt=400)], replace(windows, tokens=99)) == [Part(0, 32, True)]
    assert next_pass([begun(n, 0, prompt=400) for n in (0, 1)], replace(windows, tokens=99))[1] == Part(1, 4, True)


@settings(max_examples=60, deadline=None)
@given(machine=machines())
def test_every_row_ends_within_every_limit(machine: Machine) -> None:
    machine.run()
    asked = sorted(number for number, row in enumerate(machine.rows) for _ in row.ends)
    assert sorted(machine.ended) == asked
    assert machine.table.usage().held_pages == 0


def limits(
    *, tokens: int = 8, micro_batches: int = 2, sequences: int = 9, pages: int = 99, open_pages: int = 99
) -> Limits:
    return Limits(tokens, micro_batches, sequences, 4, pages, open_pages)


def begun(number: int, length: int, *, prompt: int = 10, drafts: int = 0, samples: int = 1) -> Running:
    return Running(number, number, prompt, 20, length, samples=samples, drafts=drafts)


def test_tokens_come_first_then_drafts_then_prompts_fill_the_last_micro_batch() -> None:
    running = [begun(0, 3), begun(1, 10, drafts=3), begun(2, 12), begun(3, 0)]
    assert next_pass(running, limits()) == [
        Part(1, 4, False),
        Part(2, 1, False),
        Part(0, 7, True),
        Part(3, 4, True),
    ]
    assert next_pass(running, limits(micro_batches=1)) == [Part(1, 4, False), Part(2, 1, False), Part(0, 3, True)]
    assert next_pass(running, limits(tokens=2, micro_batches=1)) == [Part(1, 1, False), Part(2, 1, False)]
    assert next_pass(running, limits(tokens=1, micro_batches=1)) == [Part(1, 1, False)]
    assert next_pass([], limits()) == []


def test_drafts_end_where_the_text_must() -> None:
    # 10 tokens of a prompt and 20 new ones, of which the last is never computed: one is chosen, two can still come
    assert next_pass([begun(0, 27, drafts=9)], limits()) == [Part(0, 2, False)]
    assert next_pass([begun(0, 28, drafts=9)], limits()) == [Part(0, 1, False)]


def test_a_prompt_opens_as_many_pages_as_are_left() -> None:
    assert next_pass([begun(0, 0), begun(1, 11)], limits(open_pages=3)) == [Part(1, 1, False), Part(0, 8, True)]
    assert next_pass([begun(0, 2), begun(1, 11, drafts=3)], limits(open_pages=2)) == [
        Part(1, 1, False),
        Part(0, 2, True),
    ]


def test_open_pages_are_shared_out_to_the_oldest_prompts() -> None:
    running = [begun(0, 0, prompt=9), begun(1, 0, prompt=9), begun(2, 0, prompt=9)]
    parts = next_pass(running, limits(tokens=99, open_pages=6))
    assert [part.tokens for part in parts] == [9, 8, 4]


def test_pages_that_rows_share_are_reserved_once() -> None:
    keys = page_keys(range(10), 4)
    # two pages to share, and six for the rest of the first prompt and its text
    running = [replace(begun(0, 10), keys=keys)]
    row = Waiting(1, 10, 20, keys=keys)
    assert admit(running, [row], limits(pages=13)) == []
    assert admit(running, [row], limits(pages=14)) == [Admission(1, 1, 8)]
    # nothing is shared with what is computed anew, or not sealed yet
    assert admit(running, [replace(row, keys=())], limits(pages=15)) == []
    assert admit(running, [replace(row, keys=())], limits(pages=16)) == [Admission(1, 1, 0)]
    apart = Waiting(1, 10, 20, keys=page_keys([7] * 10, 4))
    for sealed in (0, 4):
        computing = [replace(begun(0, 4), keys=keys, sealed=sealed)]
        assert admit(computing, [apart], limits(pages=15)) == []
        assert admit(computing, [apart], limits(pages=16)) == [Admission(1, 1, 0)]
        assert admit(computing, [row], limits(pages=99)) == []


def test_what_one_sequence_has_sealed_need_not_be_waited_for() -> None:
    keys = page_keys(range(10), 4)
    running = [replace(begun(0, 10), keys=keys), replace(begun(1, 0), keys=keys)]
    assert admit(running, [Waiting(2, 10, 20, keys=keys)], limits()) == [Admission(2, 1, 8)]


def test_rows_that_share_a_prefix_wait_for_it_and_others_do_not() -> None:
    first, second, other = [list(range(13)), [*range(9), 5, 5, 5], [7] * 13]
    rows = [Row(tokens, 3, [3]) for tokens in (first, second, other)]
    machine = Machine(limits(), rows, Random(0))
    machine.join()
    assert [each.running.row for each in machine.live] == [0, 2]
    machine.carry_out(next_pass([each.running for each in machine.live], machine.limits))
    machine.join()
    assert [each.running.row for each in machine.live] == [0, 2, 1]
    assert machine.live[-1].running.length == 8, "two pages are there already"


def test_a_common_prefix_is_computed_once_and_reserved_once() -> None:
    common = list(range(40))
    rows = [Row([*common, 100 + number], 3, [3, 3]) for number in range(20)]
    machine = Machine(limits(tokens=64, pages=10 + 8 * 1, sequences=8), rows, Random(0))
    machine.run()
    assert machine.computed == 40 + 20 + 20 * 2 * 2
    assert len(machine.passes) <= 3 * 5 + 2, "eight samples at a time, though each row alone would take 12 pages"


def test_no_row_overtakes_one_that_lacks_room() -> None:
    waiting = [Waiting(1, 16, 4), Waiting(2, 1, 1)]
    assert admit([begun(0, 0)], waiting, limits(pages=12)) == []
    assert [each.row for each in admit([begun(0, 0)], waiting, limits(pages=14))] == [1, 2]


def test_samples_beyond_what_can_go_on_at_once_wait_on() -> None:
    row = Waiting(1, 4, 4, samples=9)
    assert admit([], [row], limits(sequences=5))[0].samples == 5
    assert admit([], [row], limits(open_pages=3))[0].samples == 3
    assert admit([], [row], limits(pages=5))[0].samples == 4
    assert admit([begun(1, 10)], [row, Waiting(2, 1, 1)], limits())[0].row == 2


def test_what_can_never_run_is_told_exactly() -> None:
    assert too_long(Waiting(1, 30, 10), limits(pages=10)) is None
    assert too_long(Waiting(1, 31, 10), limits(pages=10)) == (41, 40)
    with pytest.raises(ValueError, match=r"leave out what is too long"):
        admit([], [Waiting(1, 31, 10)], limits(pages=10))
    with pytest.raises(ValueError, match=r"at least 1"):
        limits(open_pages=0)


def test_keys_stand_for_all_that_came_before() -> None:
    keys = page_keys(range(9), 4)
    assert page_keys([*range(8), 77], 4) == keys
    assert len(page_keys(range(8), 4)) == 1, "the last token is computed in any case"
    assert page_keys([9, *range(1, 9)], 4)[1] != keys[1]
    assert page_keys([], 4) == ()
