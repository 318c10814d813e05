"""Packing with a text: the whole way through the command, layer by layer in little memory, and everything refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from torch import Tensor

import tierstore
from tests.hf.zoo import save, tiny
from tierstore import Budget, calibrating, packing
from tierstore.assembly import Progress
from tierstore.calibrating import Calibrator, fingerprint, read_windows
from tierstore.errors import CheckpointError, ModuleError, StoreMismatchError, StoreReadError
from tierstore.formats.feedback import damping_for, pack_with_feedback
from tierstore.formats.format import Format, Parts, pack_tensor, unpack_tensor
from tierstore.formats.named import format_named
from tierstore.hf.source import Source, open_source
from tierstore.hf.tokenizer import load_tokenizer
from tierstore.packing import pack, plan_packing

WORDS = "The quick brown fox jumps over the lazy dog, and then it does so again, number {}.\n"


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny models see as little text as they have features."""
    monkeypatch.setattr(calibrating, "WINDOW_TOKENS", 64)
    monkeypatch.setattr(calibrating, "WINDOWS", 12)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(WORDS.format, range(60))))
    return path


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Opens a tiny model of the zoo as a source."""
    sources: list[Source] = []

    def open_tiny(name: str, **changes: Any) -> Source:
        save(tiny(name, **changes), tmp_path / "model", torch.float32)
        sources.append(open_source(tmp_path / "model"))
        return sources[-1]

    yield open_tiny
    for source in sources:
        source.store.close()


def some_windows(count: int = 8, length: int = 32) -> Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(0))


def forms_of(source: Source, default: str = "int4") -> dict[str, Format]:
    entries = plan_packing(source, default, {}).tensors
    return {name: format_named(entry.format) for name, entry in entries.items() if entry.format != "keep"}


def calibrated(source: Source, windows: Tensor, read: Callable[[str], Tensor] | None = None) -> dict[str, Parts]:
    """The parts of every weight, asked for as packing does."""
    calibrator = Calibrator(source.module, read or source.read, windows, forms_of(source), torch.device("cpu"))
    return {name: calibrator(name, form, source.read(name)) for name, form in forms_of(source).items()}


def same(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(part.view(torch.uint8), other[name].view(torch.uint8)) for name, part in one.items()
    )


# ---- what users do


def distance(one: Path, other: Path, tokens: Tensor) -> float:
    """Mean KL divergence of the next-token distributions of two checkpoints."""
    found = []
    for folder in (one, other):
        with tierstore.load(folder, Budget("40MiB"), device="cpu") as session, torch.no_grad():
            found.append(torch.log_softmax(session.module(tokens).logits, -1))
    return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())


def test_the_command_makes_a_store_that_is_nearer(run: Any, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    ran = run("pack", tiny_checkpoint, tmp_path / "out", "--calibrate", text, "--device", "cpu")
    assert (ran.code, ran.err) == (0, "")
    pack(tiny_checkpoint, tmp_path / "plain", device="cpu")
    tokenizer: Any = load_tokenizer(tiny_checkpoint, False)
    unseen = tokenizer(WORDS.format("one million and seventy"), return_tensors="pt")["input_ids"]
    plain, nearer = (distance(tiny_checkpoint, tmp_path / name, unseen) for name in ("plain", "out"))
    assert nearer < 0.3 * plain

    assert run("verify", tmp_path / "out").code == 0
    source = json.loads(run("info", tmp_path / "out", "--json").out)["store"]["source"]
    assert len(source["calibration"]) == 64
    again = run("pack", tiny_checkpoint, tmp_path / "out", "--calibrate", text, "--device", "cpu")
    assert "was packed before" in again.out
    ran = run("generate", tmp_path / "out", "--prompt", "hello", "--hbm", "4MiB", "--max-new-tokens", "3")
    assert ran.code == 0


def test_a_store_packed_on_another_text_is_another_store(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    pack(tiny_checkpoint, tmp_path / "out", calibrate=text, device="cpu")
    with pytest.raises(StoreMismatchError):
        pack(tiny_checkpoint, tmp_path / "out", device="cpu")
    text.write_text(text.read_text()[::-1])
    with pytest.raises(StoreMismatchError):
        pack(tiny_checkpoint, tmp_path / "out", calibrate=text, device="cpu")


KILLED = """
import os, signal, sys
import torch
from tierstore import calibrating, packing
torch.set_num_threads(1)
packing.UNIT_NBYTES = 1 << 20
calibrating.WINDOW_TOKENS, calibrating.WINDOWS = 64, 12
left = 25
def progress(at):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
packing.pack(sys.argv[1], sys.argv[2], calibrate=sys.argv[3], device="cpu", progress=progress)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_killed_packing_goes_on_and_ends_the_same(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "UNIT_NBYTES", 1 << 20)
    pack(tiny_checkpoint, tmp_path / "whole", calibrate=text, device="cpu")
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(tmp_path / "out"), str(text)]
    ended = subprocess.run(command, timeout=100, check=False, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    seen: list[Progress] = []
    pack(tiny_checkpoint, tmp_path / "out", calibrate=text, device="cpu", progress=seen.append)
    assert 0 < len(seen) < 39
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_interrupt_does_not_wait_for_a_layer(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    outputs = Calibrator._outputs

    def counted(self: Calibrator, layer: Any) -> Any:
        for made in outputs(self, layer):
            runs.append(1)
            yield made

    def interrupt(at: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibrator, "_outputs", counted)
    with pytest.raises(KeyboardInterrupt):
        pack(tiny_checkpoint, tmp_path / "out", calibrate=text, device="cpu", progress=interrupt)
    assert len(runs) < 2 * 12 * 2  # of two runs of twelve windows through each of four layers
    assert not (tmp_path / "out").exists()


# ---- what is computed


def test_each_layer_is_packed_for_what_the_packed_layers_before_it_give(opened: Any) -> None:
    source, windows = opened("LlamaForCausalLM", num_key_value_heads=4), some_windows()
    found = calibrated(source, windows)
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    model: Any = tiny("LlamaForCausalLM", num_key_value_heads=4).eval()
    forms = forms_of(source)
    for number in range(2):
        grams: dict[str, Tensor] = {}
        layer = model.model.layers[number]
        parts: dict[str, Any] = {name: layer.get_submodule(name) for name in names}
        hooks = [parts[name].register_forward_pre_hook(_adding(grams, name)) for name in names]
        with torch.no_grad():
            for window in windows:
                model(window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name in names:
            full = f"model.layers.{number}.{name}.weight"
            weight = parts[name].weight.detach()
            damping = damping_for(windows.numel(), weight.shape[1])
            assert same(found[full], pack_with_feedback(forms[full], weight, grams[name], damping)), full
            with torch.no_grad():
                weight.copy_(unpack_tensor(forms[full], found[full], weight.shape, weight.dtype))
    head: dict[str, Tensor] = {}
    model.lm_head.register_forward_pre_hook(_adding(head, "head"))
    with torch.no_grad():
        for window in windows:
            model(window[None], use_cache=False)
    weight = source.read("lm_head.weight")
    damping = damping_for(windows.numel(), weight.shape[1])
    assert same(found["lm_head.weight"], pack_with_feedback(forms["lm_head.weight"], weight, head["head"], damping))
    table = source.read("model.embed_tokens.weight")
    assert same(found["model.embed_tokens.weight"], pack_tensor(format_named("int8"), table))


def _adding(grams: dict[str, Tensor], name: str) -> Callable[[Any, Any], None]:
    def add(_: Any, args: Any) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        grams[name] = grams.get(name, torch.zeros(rows.shape[1], rows.shape[1])).addmm(rows.T, rows)

    return add


def test_experts_are_packed_for_the_tokens_that_reach_them(opened: Any) -> None:
    source = opened("MixtralForCausalLM")
    calibrator = Calibrator(source.module, source.read, some_windows(16), forms_of(source), torch.device("cpu"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = source.read(name)
    parts = calibrator(name, format_named("int4"), weight)
    assert weight.dim() == 3
    assert not same(parts, pack_tensor(format_named("int4"), weight))
    assert calibrator.notes == ()


def test_experts_that_few_tokens_reach_are_packed_as_they_are(opened: Any) -> None:
    source = opened("MixtralForCausalLM")
    calibrator = Calibrator(source.module, source.read, some_windows(1, 16), forms_of(source), torch.device("cpu"))
    name = "model.layers.0.mlp.experts.down_proj"
    weight = source.read(name)
    assert same(calibrator(name, format_named("int4"), weight), pack_tensor(format_named("int4"), weight))
    (note,) = calibrator.notes
    assert "hardly any tokens reached them" in note
    assert f"{name} (4 of 4)" in note


def test_weights_of_other_products_are_packed_as_they_are(opened: Any) -> None:
    source = opened("GPT2LMHeadModel")  # whose weights stand the other way round
    for name, parts in calibrated(source, some_windows()).items():
        assert same(parts, pack_tensor(forms_of(source)[name], source.read(name)))


def test_notes_reach_the_caller(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "MOST_FEATURES_A_TOKEN", 1)
    text.write_text("x" * 64 * 8)
    done = pack(tiny_checkpoint, tmp_path / "out", calibrate=text, device="cpu")
    assert any("hardly any tokens" in note and "down_proj" in note for note in done.notes)


def test_one_layer_is_in_memory_at_a_time(opened: Any) -> None:
    source = opened("LlamaForCausalLM", num_hidden_layers=6)
    alive: list[ReferenceType[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        tensor: Tensor = source.read(name)
        alive.append(ref(tensor))
        most = max(most, sum(there.nbytes for found in alive if (there := found()) is not None))
        return tensor

    calibrated(source, some_windows(), read)
    model = tiny("LlamaForCausalLM")
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for name, p in model.named_parameters() if "layers" not in name)
    assert 0 < most <= max(layer, outside)


def test_the_checkpoints_module_stays_as_it_is(opened: Any) -> None:
    source = opened("LlamaForCausalLM")
    before = dict(source.module.named_modules())
    calibrated(source, some_windows())
    assert dict(source.module.named_modules()) == before
    assert all(parameter.is_meta for parameter in source.module.parameters())


# ---- texts


def test_windows_are_spread_over_the_text(tiny_checkpoint: Path, text: Path) -> None:
    source = open_source(tiny_checkpoint)
    try:
        windows = read_windows(text, source)
        assert windows.shape == (12, 64)
        characters = text.read_text()
        tokenizer: Any = load_tokenizer(source.path, False)
        starts = [number * (len(characters) // 64) // 12 * 64 for number in range(12)]
        assert starts[-1] > 0.8 * len(characters)
        assert [tokenizer.decode(window) for window in windows] == [characters[at : at + 64] for at in starts]
        text.write_text(characters[: 9 * 64 + 5])
        assert read_windows(text, source).shape == (9, 64)
        assert fingerprint(windows) != fingerprint(windows.flip(0))
    finally:
        source.store.close()


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"short", ModuleError, r"has 5 tokens, calibration needs 512 at least and uses up to 768: give a longer text"),
        (b"", ModuleError, "has 0 tokens"),
        (b"\xff" * 9000, StoreReadError, "no UTF-8 text"),
        (None, StoreReadError, "cannot be read: No such file"),
    ],
)
def test_texts_that_do_not_do(
    tiny_checkpoint: Path, tmp_path: Path, content: bytes | None, error: type[Exception], said: str
) -> None:
    text = tmp_path / "other.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(error, match=said):
        pack(tiny_checkpoint, tmp_path / "out", calibrate=text, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["other.txt"] if content is not None else [])


def test_a_text_that_ends_within_a_character(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.write_text("ä" * 1000)
    monkeypatch.setattr(calibrating, "TEXT_NBYTES", 1025)
    source = open_source(tiny_checkpoint)
    try:
        assert read_windows(text, source).shape == (12, 64)
    finally:
        source.store.close()


def test_a_checkpoint_without_tokenizer(opened: Any, text: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        read_windows(text, opened("LlamaForCausalLM"))


def test_a_model_that_cannot_be_calibrated_leaves_nothing(text: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = save(tiny("BartForConditionalGeneration"), tmp_path / "model", torch.float32)
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, model)
    with pytest.raises(ModuleError, match="cannot be calibrated"):
        pack(model, tmp_path / "out", calibrate=text, device="cpu")
    pack(model, tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("BartForConditionalGeneration", "its layers are given more of a text than hidden states"),
        ("T5ForConditionalGeneration", "only models whose hidden states go from one layer of a list to the next"),
    ],
)
def test_what_is_no_decoder(opened: Any, name: str, said: str) -> None:
    with pytest.raises(ModuleError, match=said):
        calibrated(opened(name), some_windows())
