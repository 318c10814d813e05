"""The page table against a model that keeps every sequence as a list, and memory as what was really written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from tierstore.errors import CapacityError
from tierstore.pages import GONE, PageCopy, PageTable, Run

PAGE = 4


class Pages(RuleBasedStateMachine):
    """Tokens are small numbers, so that prefixes meet. ``memory`` holds what the moves wrote, and nothing else: pages
    that were freed are wiped, as a pager may do."""

    sequences = Bundle("sequences")

    @initialize(target=sequences, pages=st.integers(0, 12) | st.just(20))
    def start(self, pages: int) -> Any:
        self.table = PageTable(pages, PAGE)
        self.memory: list[list[int | None]] = [[None] * PAGE for _ in range(pages)]
        self.model: dict[int, list[int]] = {}
        self.gone: dict[int, int] = {}
        self.texts: list[list[int]] = []
        self.opened: set[int] = set()
        number: Any = self.add()
        self.write(number, [0] * 9)
        return number

    def write(self, number: int, tokens: list[int]) -> None:
        before = self.table.pages(number), self.table.usage()
        try:
            made = self.table.append(number, len(tokens))
        except CapacityError:
            assert (self.table.pages(number), self.table.usage()) == before
            assert -(-len(tokens) // PAGE) + 1 > self.table.available
            return
        assert set(made.fresh) == set(self.table.pages(number)) - set(before[0])
        assert set(made.fresh) <= {copy.target for copy in made.copies} | {run.page for run in made.runs}
        for page in made.fresh:
            self.memory[page] = [None] * PAGE
        self.opened |= set(made.fresh)
        for copy in made.copies:
            assert copy.source in self.opened - set(made.fresh)
            self.memory[copy.target][: copy.tokens] = self.memory[copy.source][: copy.tokens]
        at = len(self.model[number])
        assert sum(run.count for run in made.runs) == len(tokens)
        self.model[number] += tokens
        for run in made.runs:
            assert self.users(run.page) == 1, "a shared page is written to"
            assert not self.table.shared(run.page)
            self.memory[run.page][run.at : run.at + run.count] = list(self.model[number][at : at + run.count])
            assert run.position == at
            at += run.count

    def users(self, page: int) -> int:
        return sum(page in self.table.pages(number) for number in self.model)

    def held(self) -> set[int]:
        return {page for number in self.model for page in self.table.pages(number)} - {GONE}

    @precondition(lambda self: len(self.model) < 5)
    @rule(target=sequences)
    def add(self) -> int:
        number = self.table.add()
        self.model[number], self.gone[number] = [], 0
        return number

    @rule(number=sequences, tokens=st.lists(st.integers(0, 1), max_size=9) | st.just([0] * PAGE))
    def append(self, number: int, tokens: list[int]) -> None:
        self.write(number, tokens)

    @precondition(lambda self: len(self.model) < 5)
    @rule(target=sequences, number=sequences)
    def fork(self, number: int) -> int:
        new = self.table.fork(number)
        self.model[new], self.gone[new] = list(self.model[number]), self.gone[number]
        return new

    @rule(number=consumes(sequences))
    def remove(self, number: int) -> None:
        self.table.remove(number)
        del self.model[number]
        with pytest.raises(KeyError):
            self.table.pages(number)

    @rule(data=st.data(), count=st.integers(0, 3))
    def reorder(self, data: Any, count: int) -> None:
        if not self.model:
            return
        live = sorted(self.model)
        chosen = data.draw(st.permutations(live))[:count]
        sources = [data.draw(st.sampled_from(live)) for _ in chosen]
        available = self.table.usage().held_pages
        self.table.reorder(chosen, sources)
        assert self.table.usage().held_pages <= available
        models = [list(self.model[source]) for source in sources]
        gone = [self.gone[source] for source in sources]
        for number, model, behind in zip(chosen, models, gone, strict=True):
            self.model[number], self.gone[number] = model, behind

    @rule(number=sequences, data=st.data())
    def crop(self, number: int, data: Any) -> None:
        longest = len(self.model[number])
        length = data.draw(st.integers(0, longest) | st.sampled_from(range(0, longest + 1, PAGE)))
        if length % PAGE and length <= self.gone[number]:
            with pytest.raises(ValueError, match="behind the window"):
                self.table.crop(number, length)
            return
        self.table.crop(number, length)
        del self.model[number][length:]
        self.gone[number] = min(self.gone[number], length)

    @rule(number=sequences, data=st.data())
    def drop_before(self, number: int, data: Any) -> None:
        longest = len(self.model[number])
        position = data.draw(st.integers(0, longest + 2) | st.just(longest))
        self.table.drop_before(number, position)
        whole = min(position, len(self.model[number])) // PAGE * PAGE
        self.gone[number] = max(self.gone[number], whole)

    @rule(number=sequences, left_out=st.integers(0, 5))
    def seal(self, number: int, left_out: int) -> None:
        tokens = self.model[number][: max(len(self.model[number]) - left_out, 0)]
        self.table.seal(number, tokens)
        self.texts.append(tokens)

    @rule(target=sequences, data=st.data(), more=st.lists(st.integers(0, 1), max_size=5))
    def share(self, data: Any, more: list[int]) -> Any:
        if not self.texts:
            return multiple()
        text = data.draw(st.sampled_from(self.texts))
        tokens = text[: data.draw(st.integers(0, len(text)))] + more
        number = self.table.add()
        shared = self.table.share_prefix(number, tokens)
        assert shared % PAGE == 0
        assert shared < max(len(tokens), 1)
        self.model[number], self.gone[number] = tokens[:shared], 0
        return number

    @rule(data=st.data())
    def forget(self, data: Any) -> None:
        if self.memory:
            self.table.forget(data.draw(st.integers(0, len(self.memory) - 1)))

    @rule(count=st.integers(0, 3))
    def reclaim(self, count: int) -> None:
        before = self.table.usage()
        given_up = self.table.reclaim(count)
        assert given_up == min(count, before.kept_pages)
        after = self.table.usage()
        assert (before.kept_pages - after.kept_pages, after.free_pages - before.free_pages) == (given_up, given_up)
        assert after.held_pages == before.held_pages

    @rule()
    def take_freed(self) -> None:
        freed = self.table.take_freed()
        assert len(set(freed)) == len(freed)
        assert set(freed) <= self.opened - self.held()
        for page in freed:
            self.memory[page] = [None] * PAGE
        self.opened -= set(freed)
        usage = self.table.usage()
        assert len(self.opened) == usage.held_pages + usage.kept_pages, "the bytes of a page are never dropped"
        assert self.table.take_freed() == ()

    @invariant()
    def every_sequence_reads_what_was_written(self) -> None:
        for number, tokens in self.model.items():
            assert self.table.length(number) == len(tokens)
            behind = min(self.gone[number], len(tokens))
            read: list[int | None] = []
            for run in self.table.runs(number):
                assert run.position == behind + len(read)
                read += self.memory[run.page][run.at : run.at + run.count]
            assert read == tokens[behind:]

    @invariant()
    def every_page_is_in_one_state(self) -> None:
        usage = self.table.usage()
        assert usage.held_pages + usage.kept_pages + usage.free_pages == len(self.memory)
        held = self.held()
        assert {page for page in held if self.table.shared(page)} == {page for page in held if self.users(page) > 1}
        assert usage.held_pages == len(held)
        assert self.table.available == len(self.memory) - len(held)
        assert usage.used_tokens + usage.unused_tokens == PAGE * len(held)

    def teardown(self) -> None:
        if hasattr(self, "table"):
            for number in list(self.model):
                self.table.remove(number)
            assert self.table.available == len(self.memory)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_fork_is_copied_when_it_writes() -> None:
    table = PageTable(4, PAGE)
    first = table.add()
    table.append(first, 6)
    second = table.fork(first)
    made = table.append(second, 1)
    page = table.pages(first)[1]
    assert made.copies == (PageCopy(page, table.pages(second)[1], 2),)
    assert made.runs == (Run(6, table.pages(second)[1], 2, 1),)
    assert table.append(first, 1).copies == ()
    assert table.usage().held_pages == 3


def test_four_beams_of_a_long_prompt_take_little_more_than_one() -> None:
    table = PageTable(300, 16)
    prompt = table.add()
    table.append(prompt, 4096)
    beams = [prompt] + [table.fork(prompt) for _ in range(3)]
    for step in range(60):
        for beam in beams:
            table.append(beam, 1)
        table.reorder(beams, [beams[(step * beam) % 4] for beam in range(4)])
    assert table.usage().held_pages <= 1.2 * 4096 / 16
    assert table.usage().unused_tokens <= 4 * 16


def test_a_prefix_is_found_after_its_sequence_ended_until_its_room_is_needed() -> None:
    table = PageTable(4, PAGE)
    first = table.add()
    table.append(first, 12)
    table.seal(first, range(12))
    table.remove(first)
    again = table.add()
    assert table.share_prefix(again, range(11)) == 8  # the third page would leave nothing to compute
    assert table.available == 2
    table.append(again, 8)
    other = table.add()
    assert table.share_prefix(other, range(12)) == 8
    with pytest.raises(CapacityError, match="needs 1 more pages of 4 tokens, 0 of 4 are available"):
        table.append(other, 1)
    table.remove(again)
    table.append(other, 8)
    assert table.usage().kept_pages == 0


def test_a_page_that_was_freed_and_used_anew_is_not_freed() -> None:
    table = PageTable(3, PAGE)
    one = table.add()
    table.append(one, 12)
    assert table.take_freed() == ()
    table.crop(one, 3)
    gone = set(range(3)) - set(table.pages(one))
    used = table.append(one, 5).fresh
    assert len(used) == 1
    assert set(table.take_freed()) == gone - set(used)


def test_what_is_given_up_is_the_oldest() -> None:
    table = PageTable(4, PAGE)
    for tokens in ([1] * 8, [2] * 8):
        number = table.add()
        table.append(number, 8)
        table.seal(number, tokens)
        table.remove(number)
    assert (table.usage().kept_pages, table.take_freed()) == (4, ())
    assert table.reclaim(1) == 1
    assert len(table.take_freed()) == 1
    assert table.share_prefix(table.add(), [1] * 9) == 4  # the second page of the older went first
    assert table.share_prefix(table.add(), [2] * 9) == 8
    assert table.reclaim(9) == 0


def test_a_page_that_was_cut_back_and_written_again_is_not_what_it_was() -> None:
    table = PageTable(6, PAGE)
    one = table.add()
    table.append(one, 8)
    table.seal(one, range(8))
    table.crop(one, 6)
    assert table.share_prefix(table.add(), [*range(8), 9]) == 8  # its bytes still stand there
    made = table.append(one, 1)
    assert made.copies == (PageCopy(1, 2, 2),)
    table.seal(one, [*range(6), 60])  # no third page is full, and the second is found by what it was
    assert table.share_prefix(table.add(), [*range(6), 60, 7, 8]) == 4
    table.append(one, 1)
    table.seal(one, [*range(6), 60, 61])
    assert table.share_prefix(table.add(), [*range(8), 0]) == 8
    table.crop(one, 5)
    assert table.append(one, 3).copies == ()
    assert table.share_prefix(table.add(), [*range(6), 60, 61, 0]) == 4


def test_what_is_behind_the_window_is_cut_off_and_written_again() -> None:
    table = PageTable(4, PAGE)
    one = table.add()
    table.append(one, 12)
    table.drop_before(one, 9)
    table.seal(one, [7] * 12)
    assert table.pages(one)[:2] == (GONE, GONE)
    assert table.share_prefix(table.add(), [7] * 13) == 0  # the first pages are not there to be found
    table.crop(one, 4)
    table.append(one, 8)
    assert table.pages(one)[0] == GONE
    assert [run.position for run in table.runs(one)] == [4, 8]
    table.drop_before(one, 8)
    assert [run.position for run in table.runs(one)] == [8]


def test_pages_are_not_listed_before_they_are_used() -> None:
    table = PageTable(1 << 50, PAGE)
    table.append(table.add(), 8)
    assert table.usage().free_pages == table.available == (1 << 50) - 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda table, one: table.append(one, -1), "use crop"),
        (lambda table, one: table.crop(one, 6), "has 5 positions"),
        (lambda table, one: table.runs(one, 3, 9), r"not \[3, 9\)"),
        (lambda table, one: table.seal(one, range(6)), "6 tokens were named"),
        (lambda table, one: table.share_prefix(one, [1]), "before any"),
        (lambda table, one: table.reorder([one, one], [one, one]), "once"),
        (lambda table, one: table.reclaim(-1), "-1 pages cannot be reclaimed"),
        (lambda table, one: PageTable(-1, 4), "-1 pages"),
        (lambda table, one: PageTable(1, 0), "of 0 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Any, message: str) -> None:
    table = PageTable(4, PAGE)
    one = table.add()
    table.append(one, 5)
    with pytest.raises(ValueError, match=message):
        wrong(table, one)
    assert table.length(one) == 5
