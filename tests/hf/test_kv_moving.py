"""Where there are kernels, they write new tokens to pages and read pages in order: all is as when torch does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.edges.interpreter import Interpreter
from tests.hf.batches import greedy, some_tokens, token_model
from tests.hf.paged import decoder, generated, left_padded, paged, prompt, smallest
from tierstore.backends import backend_for
from tierstore.hf.kv import cells
from tierstore.hf.kv.moving import sent

KV: dict[str, Any] = {"kv_hbm": 1 << 20}
ONE, ROWS = {"input_ids": prompt(27)}, left_padded((19, 14))


class Movers:
    """Triton's, interpreted, in a process of its own: what they changed is copied back."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.calls = {"scatter": 0, "gather": 0}

    def scatter(self, keys: Tensor, values: Tensor, buffer: Tensor, *where: Tensor) -> None:
        self.calls["scatter"] += 1
        buffer.copy_(self.interpreter.call("paged_attention.raw", "scatter", keys, values, buffer, *where)[2])

    def gather(self, buffer: Tensor, *arguments: Tensor) -> None:
        self.calls["gather"] += 1
        found = self.interpreter.call("paged_attention.raw", "gather", buffer, *arguments)
        for into, read in zip(arguments[-2:], found[-2:], strict=True):
            into.copy_(read)


@pytest.fixture(scope="module")
def interpreted(interpreter: Interpreter) -> Movers:
    return Movers(interpreter)


@pytest.fixture
def movers(interpreted: Movers) -> Movers:
    interpreted.calls = dict.fromkeys(interpreted.calls, 0)
    return interpreted


@pytest.mark.parametrize(
    ("name", "format", "given"),
    [
        ("LlamaForCausalLM", None, ONE),
        ("LlamaForCausalLM", None, {**ONE, "num_beams": 2}),
        ("MistralForCausalLM", None, ROWS),
        ("DeepseekV3ForCausalLM", None, ROWS),
        ("FalconForCausalLM", "int8", ONE),
        ("LlamaForCausalLM", "bf16", ROWS),
    ],
)
def test_the_model_generates_the_same(
    name: str, format: str | None, given: dict[str, Any], movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = decoder(name), []
    for engaged in (None, movers):
        monkeypatch.setattr(cells, "movers_for", lambda device, these=engaged: these)
        with paged(model, format=format, **KV):
            found.append(generated(model, new=4, **given))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert movers.calls["scatter"] == 4 * model.config.num_hidden_layers, "one launch a layer"
    assert movers.calls["gather"]


@pytest.mark.parametrize("below", [{"kv_ram": 1 << 20}, {"kv_ram": 1 << 20, "kv_nvme": 1 << 20}])
def test_pages_that_went_down_are_read_as_they_come(
    below: dict[str, Any], movers: Movers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, found, waves = decoder("LlamaForCausalLM"), [], []
    least = smallest(model, **below)
    for engaged in (None, movers):
        monkeypatch.setattr(cells, "movers_for", lambda device, these=engaged: these)
        with paged(model, tmp_path, kv_hbm=2 * least, **below) as made:
            made.memory.scratch = torch.zeros(1 << 16, dtype=torch.uint8)
            found.append(generated(model, new=2, input_ids=prompt(60)))
            waves.append(sum(usage.read_nbytes for usage in made.memory.usage().cells))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert movers.calls["gather"] > 2 * model.config.num_hidden_layers, "some layers are read in parts"
    assert waves[0] == waves[1]


@pytest.mark.parametrize("format", [None, "int8"])
def test_a_batch_generates_the_same(format: str | None, movers: Movers, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = decoder("MistralForCausalLM"), []
    prompts = [some_tokens(count, count) for count in (21, 1, 9)]
    for engaged in (None, movers):
        monkeypatch.setattr(cells, "movers_for", lambda device, these=engaged: these)
        with token_model(model, format=format, **KV) as batch:
            found.append((greedy(batch, prompts, 3), [kind.cells.region.clone() for kind in batch.memory.kinds]))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert movers.calls["scatter"]


@pytest.mark.cuda
def test_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = decoder("MistralForCausalLM").cuda(), []
    given = {name: each.cuda() for name, each in ROWS.items()}
    with monkeypatch.context() as patch:
        patch.setattr(cells, "movers_for", lambda device: None)
        with paged(model, backend=backend_for("cuda"), **KV):
            found.append(generated(model, new=4, **given))
    with paged(model, backend=backend_for("cuda"), **KV) as made:
        assert all(kind.cells.movers for kind in made.memory.kinds)
        found.append(generated(model, new=4, **given))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


class OnHost:
    """A tensor of the host that notes how it is sent."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def pin_memory(self) -> OnHost:
        self.asked.append("pinned")
        return self

    def to(self, device: torch.device, **how: Any) -> OnHost:
        self.asked.append((device.type, how))
        return self


def test_a_card_gets_numbers_from_pinned_memory() -> None:
    for device, asked in (("cuda", ["pinned", ("cuda", {"non_blocking": True})]), ("cpu", [("cpu", {})])):
        numbers: Any = OnHost()
        sent(numbers, torch.device(device))
        assert numbers.asked == asked


@pytest.mark.cuda
def test_the_host_does_not_wait_for_a_card_to_send_it_numbers() -> None:
    cuda, numbers = torch.device("cuda"), torch.arange(1000)
    sent(numbers, cuda)  # memory is pinned the first time
    torch.cuda.synchronize()
    cast(Any, torch.cuda)._sleep(1 << 30)
    there = sent(numbers, cuda)
    assert not torch.cuda.current_stream().query()
    assert torch.equal(there.cpu(), numbers)
