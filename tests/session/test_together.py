"""Calls that take turns give what each gives alone, for one pass over the weights; and whatever ends them leaves
nothing behind."""

# To torch's types an attribute of a module is a Tensor or a Module.
# mypy: disable-error-code="index, no-any-return, no-untyped-call, operator"

from __future__ import annotations

import contextvars
import gc
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from greenlet import GreenletExit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import tierstore
from tierstore import Budget, Session, errors
from tierstore.backends import Backend
from tierstore.binding.baton import uninterleaved

SIZE = 64
LAYER = SIZE * SIZE * 4 + SIZE * 4


def inputs(count: int = 4) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(3 + number, SIZE, generator=random) for number in range(count)]


def layers(count: int = 6) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(count)])


def check_at_rest(session: Session) -> None:
    """No unit is in use, no call is under way, and nothing stands for a forward."""
    engaged: Any = session._engaged
    engaged.runtime.prefetcher.drop_pass()
    assert not any(held.users for name, held in engaged.runtime.prefetcher._held.items())
    assert not engaged.binder.loans._users
    assert not engaged.binder.loans._stays
    assert engaged._watch._depth == 0
    for module in session.module.modules():
        forward: Any = module.__dict__.get("forward")
        assert forward is None or (forward.outside == [] and forward.inside == [])


def through(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).detach()


def moved_by(session: Session, action: Callable[[], Any]) -> int:
    before = session.report().bytes_moved
    action()
    return session.report().bytes_moved - before


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """Six layers, two of which fit."""
    torch.manual_seed(0)
    with tierstore.offload(layers(), Budget(2 * LAYER), store=tmp_path / "store", device="cpu") as session:
        yield session


# ---- a checkpoint


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model.eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def generate(model: Any, ids: Tensor, count: int) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)


def prompts() -> list[Tensor]:
    return [(torch.arange(rows * length).reshape(rows, length) * 7) % 512 for rows, length in ((2, 9), (1, 4), (3, 1))]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_checkpoint(checkpoint: Path, plain: Any, make_backend: Callable[[], Backend], share: float) -> None:
    nbytes = sum(p.numel() * p.element_size() for p in plain.parameters())
    with pytest.raises(errors.PlanError) as refused:
        tierstore.load(checkpoint, Budget(10, ram=nbytes // 3), backend=make_backend())
    budget = Budget(max(int(share * nbytes), refused.value.needed), ram=nbytes // 3)
    with torch.no_grad():
        want = [plain(ids).logits for ids in prompts()]
    with tierstore.load(checkpoint, budget, backend=make_backend()) as session:
        model: Any = session.module
        calls = [partial(logits_of, model, ids) for ids in prompts()]
        with torch.no_grad():
            for _ in range(3):
                assert all(map(torch.equal, session.together(calls), want))
            alone = sum(moved_by(session, calls[0]) for _ in range(3))
            passes = session.report().passes
            together = sum(moved_by(session, lambda: session.together(calls)) for _ in range(3))
        assert session.report().passes == passes + 3
        assert together <= alone + nbytes // 5  # what was ahead when counting began, or ended
        assert session.report().peak_bytes["hbm"] <= budget.hbm
        check_at_rest(session)


def test_generating_together(checkpoint: Path, plain: Any, make_backend: Callable[[], Backend]) -> None:
    want = [generate(plain, ids, 2 + number) for number, ids in enumerate(prompts())]
    with tierstore.load(checkpoint, Budget("1MiB", ram="0.5MiB"), backend=make_backend()) as session:
        calls = [partial(generate, session.module, ids, 2 + n) for n, ids in enumerate(prompts())]
        session.together(calls)
        passes, misses = session.report().passes, session.report().misses
        assert all(map(torch.equal, session.together(calls), want))
        assert session.report().passes == passes + 4
        assert session.report().misses == misses
        check_at_rest(session)


def test_pages_are_for_one_call_at_a_time(checkpoint: Path, plain: Any) -> None:
    attention = plain.config._attn_implementation
    with tierstore.load(checkpoint, Budget("1MiB", kv_hbm="1MiB")) as session:
        want = [generate(session.module, ids, 2) for ids in prompts()]
        passes = session.report().passes
        calls = [partial(generate, session.module, ids, 2) for ids in prompts()]
        assert all(map(torch.equal, session.together(calls), want))
        assert session.report().passes == 2 * passes
        assert session.module.config._attn_implementation == attention  # type: ignore[union-attr]


# ---- modules of every kind


class Around(nn.Module):
    """Holds parameters of its own around its children, and changes what torch keeps for the thread."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(SIZE))
        self.first = layers(2)
        self.wide = nn.Parameter(torch.randn(SIZE, SIZE))
        self.second = layers(2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide
        with torch.no_grad():
            y = self.first(x * self.scale)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.second(y @ wide)
                with torch.inference_mode():
                    y = self.first(y)
                y = (y.clone() @ wide).float()
        return self.second(x) * self.scale + y @ wide


class Tied(nn.Module):
    """A weight in two places, one of them inside another unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(SIZE, SIZE, bias=False)
        self.body = nn.Sequential(layers(2), nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)))
        self.body[1][1].weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.body(self.embed(x)))


class Experts(nn.Module):
    """Each input takes experts of its own, between layers that all take."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for number in range(6):
            if (len(x) >> number % 3) & 1:
                x = self.experts[number](x)
        return self.after(x)


class Shared(nn.Module):
    """The same layers over and over, as often as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x)):
            x = self.two(self.one(x).relu())
        return x


class Wide(nn.Module):
    """A layer of more than half the budget: it has no turn, operations ask for its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers(3)
        self.head = nn.Linear(SIZE, 2 * SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [(layers, LAYER // 2), (Around, 0), (Tied, 0), (Experts, LAYER // 2), (Shared, 0), (Wide, 0)],
)
def test_any_module(
    tmp_path: Path, make_backend: Callable[[], Backend], kind: Callable[[], nn.Module], extra: int
) -> None:
    torch.manual_seed(0)
    module = kind()
    want = [module(x).detach() for x in inputs()]
    ram = 0 if make_backend().engine.unified else 2 * LAYER
    with pytest.raises(errors.PlanError) as refused:
        tierstore.offload(module, Budget(10, ram=ram), store=tmp_path, backend=make_backend())
    budget = Budget(refused.value.needed + extra, ram=ram)
    with tierstore.offload(module, budget, store=tmp_path, backend=make_backend()) as session:
        calls = [partial(through, module, x) for x in inputs()]
        for grad in (False, False, True, False):
            with torch.set_grad_enabled(grad):
                assert all(map(torch.equal, session.together(calls), want))
                assert torch.equal(calls[1](), want[1])
        assert not torch.is_autocast_enabled("cpu")
        assert session.report().peak_bytes["hbm"] <= budget.hbm
        check_at_rest(session)


@pytest.mark.parametrize("kind", [layers, Experts, Wide])
def test_each_unit_moves_once(tmp_path: Path, kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind()
    least = 2 * LAYER
    with tierstore.offload(module, Budget(least), store=tmp_path, device="cpu") as session, torch.no_grad():
        assert session._plan.share == 0
        calls = [partial(through, module, x) for x in inputs()]  # 3, 4, 5 and 6 rows: all experts are taken
        for _ in range(3):
            session.together(calls)
        passes = 8
        moved = moved_by(session, lambda: [session.together(calls) for _ in range(passes)])
        whole = sum(parameter.numel() * 4 for parameter in module.parameters())
        assert abs(moved - passes * whole) <= least < passes * LAYER  # some were there ahead, before and after


def test_calls_go_on_in_their_order(session: Session) -> None:
    seen: list[tuple[int, int]] = []
    number = contextvars.ContextVar[int]("number")
    handles = [
        layer.register_forward_hook(lambda *_, at=at: seen.append((at, number.get())))
        for at, layer in enumerate(session.module.children())
    ]

    def call(n: int, x: Tensor) -> Tensor:
        number.set(n)
        with torch.set_grad_enabled(n % 2 == 0):
            return session.module(x)

    session.together([partial(call, n, x) for n, x in enumerate(inputs())])
    assert seen == [(layer, n) for layer in range(6) for n in range(4)]
    with pytest.raises(LookupError):
        number.get()
    for handle in handles:
        handle.remove()


def test_few_calls_and_odd_ones(session: Session) -> None:
    x, y = inputs(2)
    want = [session.module(x), session.module(y)]
    assert session.together([]) == []
    assert torch.equal(session.together([lambda: session.module(x)])[0], want[0])
    assert session.together([lambda: 1, lambda: 2]) == [1, 2]

    def nested() -> list[Tensor]:
        return session.together([lambda: session.module(x), lambda: session.module(y)])

    def several() -> Tensor:
        return session.module(session.module(y)) + session.module(x).sum()

    alone = several()
    got: list[Any] = session.together([several, lambda: "nothing", nested, lambda: session.module(y), several])
    assert torch.equal(got[0], alone)
    assert got[1] == "nothing"
    assert all(map(torch.equal, got[2], want))
    assert torch.equal(got[3], want[1])
    assert torch.equal(got[4], alone)
    check_at_rest(session)


def test_what_lies_on_a_stack_stays_with_its_call(session: Session) -> None:
    """A mode, hooks on saved tensors: the call that has them goes on until they are gone."""

    class Doubles(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is nn.functional.linear else result

    def doubled(x: Tensor) -> Tensor:
        with Doubles():
            return session.module(x)

    def hooked(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return session.module(x)

    def apart(x: Tensor) -> Tensor:
        with uninterleaved():
            return session.module(x)

    x = inputs(1)[0]
    kinds: list[Callable[[Tensor], Tensor]] = [session.module, doubled, hooked, session.module, apart]
    want = [kind(x) for kind in kinds]
    for _ in range(2):
        got = session.together([partial(kind, x) for kind in kinds])
        assert all(map(torch.equal, got, want))
    check_at_rest(session)


def test_thread_state_is_each_calls_own(session: Session) -> None:
    """Calls that wait inside of whatever contexts, and leave them in any order."""
    contexts: list[Callable[[], Any]] = [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.inference_mode(False),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
        lambda: torch.autocast("cpu", enabled=False),
    ]

    def state() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        )

    def call(seed: int, streams: bool) -> list[tuple[Any, ...]]:
        random = Random(seed)
        seen: list[tuple[Any, ...]] = []

        def go(depth: int) -> None:
            for _ in range(1 + random.randrange(2)):
                layer = random.randrange(6)
                if streams:
                    session.module[layer](torch.ones(1, SIZE))
                seen.append(state())
                if depth:
                    with random.choice(contexts)():
                        go(depth - 1)
                    seen.append(state())

        go(3)
        return seen

    before = state()

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 2**32), min_size=4, max_size=4))
    def law(seeds: list[int]) -> None:
        want = [call(seed, False) for seed in seeds]
        assert session.together([partial(call, seed, True) for seed in seeds]) == want
        assert state() == before

    law()


# ---- ends


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GreenletExit])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_an_error_ends_all_calls(session: Session, error: Any, layer: int) -> None:
    want = [session.module(x).detach() for x in inputs()]
    ended: list[int] = []

    def call(number: int, x: Tensor) -> Tensor:
        try:
            y = x
            for at, part in enumerate(session.module.children()):
                y = part(y)
                if number == 2 and at == layer:
                    raise error("wrong")
            return y
        except GreenletExit:
            if number != 2:
                session.module(x)  # also then
            raise
        finally:
            ended.append(number)

    calls = [partial(call, n, x) for n, x in enumerate(inputs())]
    with torch.no_grad(), pytest.raises(error, match="wrong"):
        session.together(calls)
    assert ended == ([2, 3, 1, 0] if layer < 5 else [0, 1, 2, 3])
    check_at_rest(session)
    got = session.together([partial(through, session.module, x) for x in inputs()])
    assert all(map(torch.equal, got, want))


def test_an_error_inside_a_forward_and_calls_that_will_not_end(session: Session) -> None:
    def stubborn() -> Any:
        while True:
            try:
                return session.module(inputs()[0])
            except BaseException:
                continue

    def fails() -> Any:
        return session.module(torch.ones(1, SIZE + 1))

    with pytest.raises(RuntimeError, match="shape"):
        session.together([stubborn, stubborn, fails, stubborn])
    check_at_rest(session)


def test_nothing_keeps_tensors_alive(session: Session) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def call(fails: bool) -> Tensor:
        x = torch.ones(2, SIZE)
        seen.append(weakref.ref(x))
        y: Tensor = session.module(x)
        seen.append(weakref.ref(y))
        if fails:
            raise ValueError("wrong")
        return y.detach()

    session.module(torch.ones(1, SIZE))
    gc.collect()
    gc.disable()
    try:
        session.together([partial(call, False)] * 2)
        with pytest.raises(ValueError, match="wrong"):
            session.together([partial(call, fails) for fails in (False, True, False)])
        assert [ref() for ref in seen] == [None] * len(seen)
    finally:
        gc.enable()


def test_interrupted_anywhere(session: Session, alarm: None) -> None:
    random, interrupted = Random(5), 0
    calls = [partial(through, session.module, x) for x in inputs()]
    with torch.no_grad():
        want = session.together(calls)
        for _ in range(30):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 5e-3))
                for _ in range(50):
                    session.together(calls)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert all(map(torch.equal, session.together(calls), want))
    assert interrupted > 15
    check_at_rest(session)


def test_threads_beside_each_other(tmp_path: Path) -> None:
    wrong: list[Any] = []

    def work(session: Session, together: bool) -> None:
        torch.set_num_threads(1)  # a new thread does not know, and two add sums up in another order
        with torch.no_grad():
            for _ in range(5):
                calls = [partial(through, session.module, x) for x in inputs()]
                got = session.together(calls) if together else [call() for call in calls]
                if not all(map(torch.equal, got, want)):
                    wrong.append(got)

    with tierstore.offload(layers(), Budget(3 * LAYER), store=tmp_path / "store", device="cpu") as session:
        want = [session.module(x).detach() for x in inputs()]
        with ThreadPoolExecutor(3) as threads:
            for done in [threads.submit(work, session, together) for together in (True, True, False)]:
                done.result()
        assert not wrong
        check_at_rest(session)


def test_without_greenlets(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "greenlet", None)
    calls = [partial(through, session.module, x) for x in inputs()]
    with pytest.raises(errors.DeviceError, match=r"greenlet.*tierstore\[hf\]"):
        session.together(calls)
    assert len(session.together(calls[:1])) == 1
    check_at_rest(session)
    module = layers()
    with tierstore.offload(module, Budget("1MiB"), device="cpu") as still:
        assert still.together([partial(len, x) for x in inputs()]) == [3, 4, 5, 6]
    with pytest.raises(errors.SessionClosedError):
        still.together(calls)
