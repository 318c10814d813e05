"""Sessions on a real GPU: the plain module's numbers, within the budget, from whatever stream or thread."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tierstore
from tierstore import Budget, Session, Tier
from tierstore.backends import Backend, backend_for
from tierstore.contracts import Buffer, Fence
from tierstore.copies.cuda import CudaCopyEngine

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)
WIDTH = 2048
LAYERS = 12
PADDING_NBYTES = 4096
"""What a unit may lose to alignment in a pool, at most twice: in the slot and behind it."""
SLACK_NBYTES = 4 << 20
"""Small allocations and what torch rounds up."""
SLOW_CYCLES = 3_000_000
"""About 2 ms of a GPU: much longer than the host takes to issue what follows."""

PLACES = {"nvme": (0.3, 0.15), "ram": (0.3, 2.0), "both": (0.3, 0.45)}
"""Shares of the weights that ``hbm`` and ``ram`` hold, by where the rest streams from."""


def make_module() -> nn.Module:
    """Linear layers with norms, 193 MiB in float32, on the host."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()) for _ in range(LAYERS)]
    return nn.Sequential(*blocks, nn.BatchNorm1d(WIDTH)).eval()


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """The plain module, on the GPU. Not to be changed."""
    module = make_module().to(CUDA)
    with torch.no_grad():
        module(rows(0))  # what libraries keep from their first use on is there before memory is counted
    return module


def nbytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def rows(seed: int, count: int = 32) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).to(CUDA)


def budget_of(module: nn.Module, place: str) -> Budget:
    hbm, ram = PLACES[place]
    return Budget(int(nbytes_of(module) * hbm), ram=int(nbytes_of(module) * ram))


@pytest.fixture
def offloaded(tmp_path: Path) -> Iterator[Callable[..., tuple[nn.Module, Session]]]:
    """Offloads a fresh copy of the module; every session is closed at the end."""
    with ExitStack() as closing:

        def make(place: str, *, backend: Backend | None = None) -> tuple[nn.Module, Session]:
            module = make_module()
            session = tierstore.offload(module, budget_of(module, place), store=tmp_path, device=CUDA, backend=backend)
            return module, closing.enter_context(session)

        yield make


class LateCopies(CudaCopyEngine):
    """Uploads lag far behind the host: whatever does not wait for them is early."""

    def copy(self, pairs: Sequence[tuple[Buffer, Buffer]], *, after: Sequence[Fence] = ()) -> Fence:
        with torch.cuda.stream(self._up):
            cast(Any, torch.cuda)._sleep(SLOW_CYCLES)
        return super().copy(pairs, after=after)


def late_copies() -> Backend:
    return replace(backend_for(CUDA), engine=LateCopies(CUDA))


def slow_down(module: nn.Module) -> None:
    """Compute lags far behind the host: whatever does not wait for it is early."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda *_: cast(Any, torch.cuda)._sleep(SLOW_CYCLES))


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_offload_has_the_plain_numbers_within_its_budget(
    offloaded: Callable[..., tuple[nn.Module, Session]], reference: nn.Module, place: str
) -> None:
    plain_peak = peak_beyond_start(lambda: reference(rows(0)))
    start = torch.cuda.memory_allocated(CUDA)
    module, session = offloaded(place)
    tiers = set(session.plan.tier.values())
    assert {"nvme": Tier.NVME, "ram": Tier.RAM, "both": Tier.NVME}[place] in tiers
    assert place != "both" or Tier.RAM in tiers
    for seed in range(5):
        assert torch.equal(module(rows(seed)), reference(rows(seed)))
    torch.cuda.reset_peak_memory_stats(CUDA)
    out = module(rows(7))
    torch.cuda.synchronize(CUDA)
    taken = torch.cuda.max_memory_allocated(CUDA) - start
    budget, report = budget_of(module, place), session.report()
    assert torch.equal(out, reference(rows(7)))
    assert report.peak_bytes["hbm"] <= budget.hbm
    assert report.peak_bytes["ram"] <= budget.ram
    assert report.bytes_moved > nbytes_of(module)
    assert taken <= budget.hbm + plain_peak + 2 * PADDING_NBYTES * len(session.plan.tier) + SLACK_NBYTES


def peak_beyond_start(run: Callable[[], Any]) -> int:
    """Bytes that a run takes for a time, what it returns included."""
    run()  # what is made once
    torch.cuda.synchronize(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    start = torch.cuda.memory_allocated(CUDA)
    out = run()
    torch.cuda.synchronize(CUDA)
    del out
    return torch.cuda.max_memory_allocated(CUDA) - start


@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("place", PLACES)
def test_close_leaves_the_module_as_it_was(reference: nn.Module, tmp_path: Path, place: str, home: str) -> None:
    gc.collect()
    before_all = torch.cuda.memory_allocated(CUDA)
    module = make_module().to(CUDA if home == "cuda" else "cpu")
    before = torch.cuda.memory_allocated(CUDA)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    truth = {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}
    with tierstore.offload(module, budget_of(module, place), store=tmp_path, device=CUDA), torch.no_grad():
        assert {p.device for p in module.parameters()} == {CUDA}
        assert {b.device for b in module.buffers()} == {CUDA}
        out = module(rows(0))  # under way while the session closes
    assert torch.equal(out, reference(rows(0)))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        assert tensor is tensors[name]
        assert tensor.device.type == home
        assert type(tensor) in (nn.Parameter, Tensor)
        assert torch.equal(tensor.cpu(), truth[name]), name
    del out, tensor
    gc.collect()
    assert torch.cuda.memory_allocated(CUDA) <= before
    with torch.no_grad():
        assert torch.equal(module.to(CUDA)(rows(1)), reference(rows(1)))
    del module, tensors
    gc.collect()
    assert torch.cuda.memory_allocated(CUDA) <= before_all


@torch.no_grad()
def test_everything_fits(reference: nn.Module) -> None:
    module = make_module()
    with tierstore.offload(module, Budget(2 * nbytes_of(module), ram="64MiB"), device=CUDA) as session:
        for seed in range(3):
            assert torch.equal(module(rows(seed)), reference(rows(seed)))
        assert session.plan.share == 1
        assert session.report().misses == 0


@pytest.mark.parametrize("place", PLACES)
def test_slow_compute_keeps_its_weights(
    offloaded: Callable[..., tuple[nn.Module, Session]], reference: nn.Module, place: str
) -> None:
    """The host is passes ahead of the GPU: a slot that is written again too early gives a wrong number."""
    module, _ = offloaded(place)
    slow_down(module)
    with torch.no_grad():
        outs = [module(rows(seed)) for seed in range(4)]
        for seed, out in enumerate(outs):
            assert torch.equal(out, reference(rows(seed)))


@pytest.mark.parametrize("slow", ["compute", "copies"])
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_side_streams_take_turns(
    offloaded: Callable[..., tuple[nn.Module, Session]], reference: nn.Module, place: str, slow: str
) -> None:
    """Two streams that never wait for each other use the same slots: neither reads too early or loses what it reads."""
    module, _ = offloaded(place, backend=late_copies() if slow == "copies" else None)
    if slow == "compute":
        slow_down(module)
    inputs = [rows(seed) for seed in range(6)]
    expected = [reference(x) for x in inputs]
    torch.cuda.synchronize(CUDA)
    streams = [cast(torch.cuda.Stream, cast(Any, torch.cuda).Stream(CUDA)) for _ in range(2)]
    outs = []
    for number, x in enumerate(inputs):
        with torch.cuda.stream(streams[number % 2]):
            outs.append(module(x))
    for number, (out, true) in enumerate(zip(outs, expected, strict=True)):
        streams[number % 2].synchronize()
        assert torch.equal(out, true)


@torch.no_grad()
def test_residents_are_there_for_every_stream(reference: nn.Module) -> None:
    """What was brought in on one stream is used on another at once, without a word between them."""
    x = rows(0)
    expected = reference(x)
    for _ in range(3):
        module = make_module()
        stream = cast(torch.cuda.Stream, cast(Any, torch.cuda).Stream(CUDA))
        torch.cuda.synchronize(CUDA)
        with tierstore.offload(module, Budget(2 * nbytes_of(module), ram="64MiB"), backend=late_copies()):
            with torch.cuda.stream(stream):
                out = module(x)
            stream.synchronize()
            assert torch.equal(out, expected)


@pytest.mark.parametrize("place", ["ram"])  # whose ring holds a unit for each thread
@pytest.mark.parametrize("apart", [False, True], ids=["one-stream", "own-streams"])
@pytest.mark.parametrize("slow", ["compute", "copies"])
def test_threads_run_it_at_once(
    offloaded: Callable[..., tuple[nn.Module, Session]], reference: nn.Module, place: str, slow: str, apart: bool
) -> None:
    module, _ = offloaded(place, backend=late_copies() if slow == "copies" else None)
    if slow == "compute":
        slow_down(module)
    inputs = [[rows(10 * thread + turn) for turn in range(6)] for thread in range(2)]
    with torch.no_grad():
        expected = [[reference(x) for x in each] for each in inputs]
    torch.cuda.synchronize(CUDA)
    together, failures = Barrier(2), list[BaseException]()

    def work(number: int) -> None:
        try:
            stream = cast(Any, torch.cuda).Stream(CUDA) if apart else torch.cuda.default_stream(CUDA)
            together.wait(30)
            with torch.no_grad(), torch.cuda.stream(stream):
                outs = [module(x) for x in inputs[number]]
                stream.synchronize()
                assert all(torch.equal(out, true) for out, true in zip(outs, expected[number], strict=True))
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=50)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_those_of_the_plain_module(
    offloaded: Callable[..., tuple[nn.Module, Session]], place: str
) -> None:
    plain = make_module().to(CUDA)
    module, _ = offloaded(place)
    for seed in range(2):
        plain(rows(seed)).square().mean().backward()
        module(rows(seed)).square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.device == CUDA
        assert torch.equal(parameter.grad, cast(Tensor, theirs[name].grad)), name


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_uses_out_of_turn_are_right(
    offloaded: Callable[..., tuple[nn.Module, Session]], reference: nn.Module, place: str
) -> None:
    ours, _ = offloaded(place)
    module, plain, x = cast(Any, ours), cast(Any, reference), rows(0)
    module(x)
    for layer in (5, 0, 7, 3):
        mine, true = module[layer][0], plain[layer][0]
        assert torch.equal(F.linear(x, mine.weight, mine.bias), F.linear(x, true.weight, true.bias))
        assert torch.equal(x @ mine.weight.T[:, :100], x @ true.weight.T[:, :100])
        assert torch.equal(mine.weight.sum(), true.weight.sum())
        assert mine.weight[3].tolist() == true.weight[3].tolist()
        assert torch.equal(mine.weight.cpu(), true.weight.cpu())
    assert torch.equal(module[2](x), plain[2](x))
    assert torch.equal(module(x), plain(x))
    state = module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_an_exception_in_the_middle(
    offloaded: Callable[..., tuple[nn.Module, Session]], reference: nn.Module, kind: type[BaseException]
) -> None:
    module, _ = offloaded("both")
    for layer in (0, 4, 7):
        part = cast(Any, module)[layer][0]

        def fail(*_: Any) -> None:
            raise kind("broken off")

        handle = part.register_forward_hook(fail)
        with pytest.raises(kind, match="broken off"):
            module(rows(layer))
        handle.remove()
        assert torch.equal(module(rows(layer)), reference(rows(layer)))


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_writes_survive(offloaded: Callable[..., tuple[nn.Module, Session]], place: str) -> None:
    plain = make_module().to(CUDA)
    module, session = offloaded(place)
    module(rows(0))
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        ours.mul_(1.25).add_(0.125)
        theirs.mul_(1.25).add_(0.125)
    for seed in range(3):
        assert torch.equal(module(rows(seed)), plain(rows(seed)))
    session.close()
    for (name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert ours.device.type == "cpu"
        assert torch.equal(ours, theirs.cpu()), name


@torch.no_grad()
def test_autocast(offloaded: Callable[..., tuple[nn.Module, Session]], reference: nn.Module) -> None:
    module, _ = offloaded("ram")
    for seed in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            expected = reference(rows(seed))
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(module(rows(seed)), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
@torch.no_grad()
def test_a_device_that_is_not_the_current_one(tmp_path: Path, reference: nn.Module) -> None:
    module, other = make_module(), torch.device("cuda", 1)
    plain = make_module().to(other)
    with tierstore.offload(module, budget_of(module, "both"), store=tmp_path, device=other):
        for seed in range(3):
            assert torch.equal(module(rows(seed).to(other)), plain(rows(seed).to(other)))


# A checkpoint, as transformers writes it


PROMPT = torch.arange(2 * 9).reshape(2, 9) % 512 + 1


@pytest.fixture(scope="module")
def plain_model(checkpoint: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model.eval().to(CUDA)


def generate(model: Any) -> Tensor:
    prompt = PROMPT.to(CUDA)
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6, 0.9, 1.2])
@pytest.mark.parametrize("ram", [0.15, 0.45, 2.0])
def test_load_has_the_plain_numbers_within_its_budget(
    checkpoint: Path, plain_model: Any, share: float, ram: float
) -> None:
    prompt, nbytes = PROMPT.to(CUDA), nbytes_of(plain_model)
    budget = Budget(int(nbytes * share), ram=int(nbytes * ram))
    with torch.no_grad():
        expected = plain_model(prompt).logits
    tokens = generate(plain_model)
    with tierstore.load(checkpoint, budget, device=CUDA) as session:
        with torch.no_grad():
            assert torch.equal(session.module(prompt).logits, expected)
        assert torch.equal(generate(session.module), tokens)
        with torch.inference_mode():
            assert torch.equal(session.module(prompt).logits, expected)
        assert torch.equal(session.module(prompt).logits, expected)
        report = session.report()
    assert report.peak_bytes["hbm"] <= budget.hbm
    assert report.peak_bytes["ram"] <= budget.ram
    assert report.peak_bytes["nvme"] == 0
    assert report.links["ram->hbm"].nbytes > 0
    gc.collect()
    with pytest.raises(tierstore.errors.SessionClosedError):
        session.module(prompt)


def test_a_loaded_model_gives_its_memory_back(checkpoint: Path, plain_model: Any) -> None:
    nbytes = nbytes_of(plain_model)
    generate(plain_model)  # what libraries keep from their first use on is there before memory is counted
    gc.collect()
    before = torch.cuda.memory_allocated(CUDA)
    with tierstore.load(checkpoint, Budget(nbytes // 2, ram=nbytes), device=CUDA) as session:
        generate(session.module)
        assert torch.cuda.memory_allocated(CUDA) > before
    del session
    gc.collect()
    assert torch.cuda.memory_allocated(CUDA) <= before
