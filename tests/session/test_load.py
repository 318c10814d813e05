"""A loaded checkpoint gives the plain model's numbers within its budget, writes nothing, and ends clean."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tierstore
from tierstore import Budget, errors
from tierstore.backends import Backend

PROMPT = torch.arange(2 * 9).reshape(2, 9) % 512 + 1
MASK = torch.ones_like(PROMPT)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model.eval()


@pytest.fixture(scope="module")
def nbytes(plain: Any) -> int:
    return sum(p.numel() * p.element_size() for p in plain.parameters())


@pytest.fixture(scope="module")
def expected(plain: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return plain(PROMPT).logits, generate(plain)


def generate(model: Any) -> torch.Tensor:
    return model.generate(PROMPT, attention_mask=MASK, max_new_tokens=6, do_sample=False)  # type: ignore[no-any-return]


def run_passes(model: Any, count: int) -> None:
    for _ in range(count):
        model(PROMPT)


def files_below(path: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in path.rglob("*")}


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6, 0.9, 1.2])
@pytest.mark.parametrize("ram", [0.3, 2.0])
def test_same_numbers_within_the_budget(
    checkpoint: Path,
    expected: tuple[torch.Tensor, torch.Tensor],
    nbytes: int,
    make_backend: Callable[[], Backend],
    share: float,
    ram: float,
) -> None:
    logits, tokens = expected
    before = files_below(checkpoint)
    budget = Budget(int(nbytes * share), ram=int(nbytes * ram))
    with tierstore.load(checkpoint, budget, backend=make_backend()) as session:
        with torch.no_grad():
            assert torch.equal(session.module(PROMPT).logits, logits)
        assert torch.equal(generate(session.module), tokens)
        with torch.inference_mode():
            assert torch.equal(session.module(PROMPT).logits, logits)
        assert torch.equal(session.module(PROMPT).logits, logits)  # with gradients
        report = session.report()
    assert report.peak_bytes["hbm"] <= budget.hbm
    assert report.peak_bytes["ram"] <= budget.ram
    assert report.peak_bytes["nvme"] == 0
    assert files_below(checkpoint) == before
    assert report.bytes_moved >= nbytes * 0.9
    assert report.passes >= 8


def test_without_ram_on_the_cpu(checkpoint: Path, expected: Any, nbytes: int) -> None:
    with tierstore.load(checkpoint, Budget(nbytes // 4)) as session:
        assert torch.equal(generate(session.module), expected[1])
        steady = session.report()
        generate(session.module)
        assert session.report().misses == steady.misses
    assert str(steady)
    assert session.report().peak_bytes == steady.peak_bytes


def test_gradients_are_those_of_the_plain_model(checkpoint: Path, plain: Any, nbytes: int) -> None:
    plain.zero_grad()
    plain(PROMPT, labels=PROMPT).loss.backward()
    with tierstore.load(checkpoint, Budget(nbytes // 3)) as session:
        session.module(PROMPT, labels=PROMPT).loss.backward()
        for (name, ours), (_, theirs) in zip(session.module.named_parameters(), plain.named_parameters(), strict=True):
            assert ours.grad is not None
            assert torch.equal(ours.grad, theirs.grad), name
    plain.zero_grad()


def test_parameters_and_state_are_shown_as_they_are(checkpoint: Path, plain: Any, nbytes: int) -> None:
    truth = plain.state_dict()
    with tierstore.load(checkpoint, Budget(nbytes // 4)) as session:
        shown = session.module.state_dict()
        assert list(shown) == list(truth)
        for name, tensor in truth.items():
            assert (shown[name].shape, shown[name].dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(shown[name], tensor), name
        assert session.report().peak_bytes["hbm"] <= nbytes // 4


def test_a_closed_session_says_so(checkpoint: Path, nbytes: int) -> None:
    session = tierstore.load(checkpoint, Budget(nbytes // 4))
    session.module(PROMPT)
    session.close()
    session.close()
    with pytest.raises(errors.SessionClosedError):
        session.module(PROMPT)


def test_the_smallest_budget_is_named_and_works(checkpoint: Path, expected: Any) -> None:
    with pytest.raises(errors.PlanError) as refused:
        tierstore.load(checkpoint, Budget(10))
    needed = refused.value.needed
    assert str(needed) in str(refused.value)
    with pytest.raises(errors.PlanError):
        tierstore.load(checkpoint, Budget(needed - 1))
    with tierstore.load(checkpoint, Budget(needed)) as session, torch.no_grad():
        assert torch.equal(session.module(PROMPT).logits, expected[0])


def test_reading_a_failed_disk_is_an_error_once_and_right_after(
    checkpoint: Path, expected: Any, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierstore.stores import reader

    fill = reader._File.fill
    broken = False

    def failing(self: Any, *args: Any) -> None:
        if broken:
            raise OSError(5, "Input/output error")
        fill(self, *args)

    monkeypatch.setattr(reader._File, "fill", failing)
    with tierstore.load(checkpoint, Budget(nbytes // 4)) as session, torch.no_grad():
        assert torch.equal(session.module(PROMPT).logits, expected[0])
        broken = True
        with pytest.raises(errors.StoreReadError, match="Input/output error"):
            run_passes(session.module, 3)
        broken = False
        for _ in range(2):
            assert torch.equal(session.module(PROMPT).logits, expected[0])


def test_a_shard_cut_short_while_open(checkpoint: Path, tmp_path: Path, nbytes: int) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    with tierstore.load(copy, Budget(nbytes // 4)) as session:
        for shard in copy.glob("*.safetensors"):
            with shard.open("r+b") as file:
                file.truncate(5000)
        with pytest.raises(errors.StoreReadError, match=r"\.safetensors"), torch.no_grad():
            run_passes(session.module, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "nonsense"},
        {"device": "cuda:99"},
        {"device": "meta"},
    ],
)
def test_a_device_that_is_not_there(checkpoint: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.DeviceError):
        tierstore.load(checkpoint, Budget("1GiB"), **arguments)


def test_bad_budgets_and_paths(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.BudgetError):
        tierstore.load(checkpoint, Budget("1000TiB"))
    with pytest.raises(errors.BudgetError):
        tierstore.load(checkpoint, "4GiB")  # type: ignore[arg-type]
    with pytest.raises(errors.TierstoreError):
        tierstore.load(tmp_path / "missing", Budget("1MiB"))
    for bad in (-1, "-1GiB", 0, "8 potatoes", "", 1.5, True, None, "1.5B"):
        with pytest.raises(errors.BudgetError):
            Budget(bad)  # type: ignore[arg-type]
    assert Budget("1.5KiB", ram="2KB", nvme=3) == Budget(1536, ram=2000, nvme=3)


def test_writing_to_a_streamed_weight_of_a_checkpoint_is_refused_and_undone(
    checkpoint: Path, expected: Any, nbytes: int
) -> None:
    with tierstore.load(checkpoint, Budget(nbytes // 4)) as session, torch.no_grad():
        session.module(PROMPT)
        refused = 0
        for parameter in session.module.parameters():
            kept = parameter.clone()
            try:
                parameter.mul_(2)
            except errors.StoreError:
                refused += 1
                assert torch.equal(parameter, kept)
            else:
                assert torch.equal(parameter, kept * 2)
                parameter.copy_(kept)
        assert refused
        assert torch.equal(session.module(PROMPT).logits, expected[0])


def test_two_threads_run_the_module_at_once(
    checkpoint: Path, expected: Any, nbytes: int, make_backend: Callable[[], Backend]
) -> None:
    with tierstore.load(checkpoint, Budget(nbytes // 2, ram=2 * nbytes), backend=make_backend()) as session:
        ready = threading.Barrier(2)

        def work() -> list[bool]:
            ready.wait()
            with torch.no_grad():
                return [torch.equal(session.module(PROMPT).logits, expected[0]) for _ in range(8)]

        with ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(work) for _ in range(2)]
            assert all(all(run.result()) for run in runs)


def test_the_named_budget_is_enough_for_a_product_with_a_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 512)).eval()
    expected = module(torch.ones(1, 64)).detach()
    with pytest.raises(errors.PlanError) as refused:
        tierstore.offload(module, Budget(512 * 64 * 4), store=tmp_path)
    assert refused.value.needed == 512 * 64 * 4 + 512 * 4
    with tierstore.offload(module, Budget(refused.value.needed), store=tmp_path), torch.no_grad():
        assert torch.equal(module(torch.ones(1, 64)), expected)


def test_following_what_is_needed_ends(checkpoint: Path, make_backend: Callable[[], Backend], expected: Any) -> None:
    """Without RAM to pass through too: each refusal asks for more than the one before, until the load is done."""
    asked = [1]
    session: Any = None
    while session is None:
        try:
            session = tierstore.load(checkpoint, Budget(asked[-1]), backend=make_backend())
        except errors.PlanError as error:
            asked.append(error.needed)
        assert asked == sorted(set(asked))
    with session, torch.no_grad():
        assert torch.equal(session.module(PROMPT).logits, expected[0])


def test_weights_that_are_all_cast_in_memory(checkpoint: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with tierstore.load(checkpoint, Budget("64MiB"), dtype=torch.float32) as session, torch.no_grad():
        assert torch.equal(session.module(PROMPT).logits, plain.eval()(PROMPT).logits)
        assert session.report().notes
