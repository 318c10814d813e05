"""A device that is as unhelpful as its contract allows, so that a missing fence becomes a wrong number without a GPU.

Copies happen as late as their fences allow and in any order that these allow; what a copy may not rely
on is poison until then. Memory is poisoned when its lease is given back. Every copy is checked against
everything that touched the same bytes before: what it neither lists in ``after``, directly or through
what that depends on, nor was waited for by the host, it races with, however well it went this time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import cast

import torch

from tierstore.contracts import Buffer, Fence, Pool
from tierstore.copies.cpu import check_sizes
from tierstore.pools.region import RegionLease
from tierstore.testing.poison import POISON, PoisonPool, poison


class _Point:
    """A fence of the adversary: some work, and the points that come before it."""

    def __init__(self, engine: AdversaryEngine, before: Sequence[_Point]) -> None:
        self.engine = engine
        self.before = before
        self.happened = True  # whether the bytes have moved
        self.seen = False  # whether the host may know
        self.error: AssertionError | None = None

    def done(self) -> bool:
        """False until this, or something after it, was waited for."""
        return self.seen

    def wait(self) -> None:
        """Let it happen now, and let the host know."""
        self.engine._reach(self, seen=True)
        self._raise()

    def gate(self) -> None:
        """Let it happen before the next line of compute; the host may or may not come to know."""
        if not self.engine._collects(self):
            self.engine._reach(self, seen=False)
            self._raise()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)


class _Copy(_Point):
    """A copy that has not happened yet, and what must not change until it has."""

    def __init__(self, engine: AdversaryEngine, before: Sequence[_Point], pairs: _Pairs) -> None:
        super().__init__(engine, before)
        self.pairs = pairs
        self.happened = False
        self.targets = [_range(dst) for _, dst in pairs if dst.numel()]
        self.then: list[Callable[[], None]] = []
        # Both sides belong to the copy from now on, unless what it comes after still uses them.
        self.sources = [src.clone() for src, _ in pairs] if all(point.happened for point in before) else None
        if self.sources is not None:
            for _, dst in pairs:
                poison(dst)

    def happen(self) -> None:
        if self.sources is not None:
            for (src, dst), source in zip(self.pairs, self.sources, strict=True):
                if not torch.equal(src, source):
                    self.fail("the source was written to before the copy was complete")
                if not bool((dst == POISON).all()):
                    self.fail("the destination was written to before the copy was complete")
        for src, dst in self.pairs:
            dst.copy_(src)
        self.happened, self.pairs, self.sources = True, (), None
        for action in self.then:
            action()

    def fail(self, what: str) -> None:
        self.engine.faults.append(what)
        self.error = self.error or AssertionError(what)


_Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _Touch:
    """Bytes ``[start, end)`` of the address space are used until ``fence``."""

    start: int
    end: int
    fence: Fence
    how: str  # "read", "written", "leased", "computed with"
    thread: int = 0

    def over(self) -> bool:
        """Whether the host knows that it has ended."""
        return self.fence.done()

    def within(self, start: int, end: int) -> bool:
        """Whether ``[start, end)`` contains it."""
        return start <= self.start and self.end <= end

    def overlaps(self, start: int, end: int) -> bool:
        """Whether it shares a byte with ``[start, end)``."""
        return self.start < end and start < self.end


class AdversaryEngine:
    """A ``CopyEngine`` whose device memory is host memory; ``discrete`` says that compute cannot tell.

    ``faults`` lists every breach of the contract that was seen; each is also raised as ``AssertionError``
    by the fence of the copy concerned. ``check`` raises when there was one.
    """

    def __init__(self, seed: int, *, discrete: bool = True) -> None:
        self.unified = not discrete
        self.faults: list[str] = []
        self._random = Random(seed)
        self._lock = threading.RLock()
        self._local = threading.local()
        self._waiting: list[_Copy] = []
        self._touches: list[_Touch] = []

    def copy(self, pairs: Sequence[tuple[Buffer, Buffer]], *, after: Sequence[Fence] = ()) -> Fence:
        """A copy of each ``(src, dst)`` that happens when somebody insists."""
        check_sizes(pairs)
        tensors = [(cast(torch.Tensor, src), cast(torch.Tensor, dst)) for src, dst in pairs]
        before = self._points_of(after)
        with self._lock:
            races = [race for src, dst in tensors for race in self._races(src, dst, before, after)]
            copy = _Copy(self, before, tensors)
            for race in races:
                copy.fail(race)
            for src, dst in tensors:
                self._note(*_range(src), copy, "read")
                self._note(*_range(dst), copy, "written")
            self._waiting.append(copy)
        return copy

    def mark(self) -> Fence:
        """Complete, but the host does not know, and only those who list it may count on it."""
        point = _Point(self, tuple(self._stream))
        self._local.stream = [point]
        return point

    def close(self) -> None:
        """Let everything happen. Idempotent."""
        with self._lock:
            self._run(list(self._waiting))

    def check(self) -> None:
        """Raise ``AssertionError`` when any contract was broken, seen by a fence or not."""
        self.close()
        if self.faults:
            raise AssertionError("\n".join(self.faults))

    def released(self, buffer: torch.Tensor, fence: Fence) -> None:
        """The lease of ``buffer`` ends with ``fence``: poison it as soon as nothing may rely on it."""
        try:
            points = self._points_of([fence])
        except Exception:  # what failed is over; whoever used the unit was told
            points = ()
        with self._lock:
            start, end = _range(buffer)
            # What the end of the lease comes after needs no watching of its own any more.
            self._touches = [
                touch
                for touch in self._touches
                if touch.how != "computed with" or not touch.within(start, end) or not _comes_after(points, touch.fence)
            ]
            for point in points:
                self._note(start, end, point, "leased")
            last = [copy for copy in _all_before(points, pending=True) if isinstance(copy, _Copy)]
            if last:  # the bytes are on their way in or out until all of these have happened
                left = len(last)

                def one_less() -> None:
                    nonlocal left
                    left -= 1
                    if not left:
                        poison(buffer)

                for copy in last:
                    copy.then.append(one_less)
            else:
                poison(buffer)

    def check_written_in_place(self, lease: RegionLease) -> None:
        """Where compute and store share memory, who fills a lease must have waited for its earlier users."""
        start, end = _range(lease.buffer)
        # not under the lock: these fences have locks of their own, which others hold while they wait for a copy
        late = any(not fence.done() for fence in lease.after)
        with self._lock:
            copied = any(touch.how == "written" and touch.overlaps(start, end) for touch in self._touches)
            if self.unified and late and not copied and not bool((lease.buffer == POISON).all()):
                self.faults.append(f"{lease.extent} was filled before its earlier users were waited for")

    def forget(self, region: torch.Tensor) -> None:
        """The memory of ``region`` goes away; the same addresses may come back for something else."""
        start, end = _range(region)
        with self._lock:
            self._touches = [touch for touch in self._touches if not touch.overlaps(start, end)]

    @property
    def _stream(self) -> list[_Point]:
        """What the compute of this thread comes after."""
        stream: list[_Point] = self._local.__dict__.setdefault("stream", [])
        return stream

    def _points_of(self, fences: Iterable[Fence]) -> tuple[_Point, ...]:
        """The points that ``fences`` gate by, whatever they are wrapped in; other fences are waited for."""
        collected: list[_Point] = []
        self._local.collected = collected
        try:
            for fence in fences:
                fence.gate()
        finally:
            self._local.collected = None
        return tuple(collected)

    def _collects(self, point: _Point) -> bool:
        collected: list[_Point] | None = getattr(self._local, "collected", None)
        if collected is None:
            return False
        collected.append(point)
        return True

    def _reach(self, point: _Point, *, seen: bool) -> None:
        with self._lock:
            others = [copy for copy in self._waiting if self._random.random() < 0.25]
            self._run([*others, point])
            if not seen:
                self._stream.append(self._use(point) if isinstance(point, _Copy) else point)
            if seen or self._random.random() < 0.5:
                for reached in _all_before([point]):
                    reached.seen, reached.before = True, ()

    def _use(self, copy: _Copy) -> _Point:
        """What the compute of this thread does with the bytes, from now until a mark that it takes later."""
        use = _Point(self, (copy,))
        for start, end in copy.targets:
            self._note(start, end, use, "computed with")
        return use

    def _run(self, points: list[_Point] | list[_Copy]) -> None:
        """Let ``points``, and the copies they come after, happen in a random order of those that are legal."""
        wanted = [point for point in _all_before(points, pending=True) if isinstance(point, _Copy)]
        while wanted:
            ready = [copy for copy in wanted if all(point.happened for point in copy.before)]
            copy = self._random.choice(ready)
            copy.happen()
            wanted.remove(copy)
            self._waiting.remove(copy)

    def _note(self, start: int, end: int, fence: Fence, how: str) -> None:
        thread = threading.get_ident()

        def replaced(touch: _Touch) -> bool:
            """A write leaves nothing else to watch; of reads and of one thread's compute the last is enough."""
            same = touch.how == how and (how == "read" or (how == "computed with" and touch.thread == thread))
            return touch.within(start, end) and (how == "written" or same)

        if start < end:
            kept = [touch for touch in self._touches if not replaced(touch) and not touch.over()]
            self._touches = [*kept, _Touch(start, end, fence, how, thread)]

    def _races(
        self, src: torch.Tensor, dst: torch.Tensor, before: Sequence[_Point], after: Sequence[Fence]
    ) -> Iterable[str]:
        """What the copy would race with."""
        for buffer, verb, conflicts in (
            (src, "reads", {"written"}),
            (dst, "overwrites", {"read", "written", "leased", "computed with"}),
        ):
            start, end = _range(buffer)
            for touch in self._touches:
                if touch.how in conflicts and touch.overlaps(start, end):
                    listed = any(fence is touch.fence for fence in (*before, *after))
                    if not listed and not touch.over() and not _comes_after(before, touch.fence):
                        yield (
                            f"a copy {verb} {end - start} bytes at {start:#x} that are still {touch.how} "
                            "by something that is not in its `after`"
                        )


@dataclass(frozen=True)
class Adversary:
    """What a session needs in place of a device: its engine, and what makes its pools (device or staging)."""

    engine: AdversaryEngine
    pool: Callable[[int], Pool]


def adversary(seed: int, *, discrete: bool = True) -> Adversary:
    """An adversary that draws its order from ``seed``. Call ``engine.check()`` at the end."""
    engine = AdversaryEngine(seed, discrete=discrete)
    return Adversary(engine, lambda nbytes: PoisonPool(nbytes, engine))


def _range(buffer: torch.Tensor) -> tuple[int, int]:
    start = buffer.data_ptr()
    return start, start + buffer.numel()


def _all_before(points: Iterable[_Point], *, pending: bool = False) -> list[_Point]:
    """``points`` and what they come after; with ``pending`` only what has not happened."""
    found: dict[int, _Point] = {}
    queue = deque(points)
    while queue:
        point = queue.popleft()
        if id(point) not in found and not (pending and point.happened):
            found[id(point)] = point
            queue.extend(point.before)
    return list(found.values())


def _comes_after(points: Iterable[_Point], fence: Fence) -> bool:
    """Whether one of ``points`` is ``fence`` or comes after it."""
    seen: set[int] = set()
    queue = deque(points)
    while queue:
        point = queue.popleft()
        if point is fence:
            return True
        if id(point) not in seen:
            seen.add(id(point))
            queue.extend(point.before)
    return False
