"""pack, verify and info: through the command, through a kill, and with everything that can be wrong."""

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

import pytest
import torch
from safetensors.torch import load_file, save_file

import tierstore
from tests.hf.test_gguf import write_gguf
from tierstore import Budget, packing
from tierstore.assembly import Progress
from tierstore.errors import (
    CheckpointError,
    ChecksumError,
    ModuleError,
    StoreFormatError,
    StoreFullError,
    StoreIncompleteError,
    StoreMismatchError,
)
from tierstore.packing import pack

UNIT = Path("weights.zarr") / "unit-00000" / "c" / "0"
MANIFEST = Path("weights.zarr") / "zarr.json"
PROMPT = torch.arange(8).reshape(1, 8)


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as int4, in several units. Read only."""
    out = tmp_path_factory.mktemp("packed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "UNIT_NBYTES", 1 << 20)
        pack(tiny_checkpoint, out, format="int4", device="cpu")
    return out


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A packed store that may be spoilt."""
    return Path(shutil.copytree(packed, tmp_path / "store"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def use(model: Path, **how: Any) -> torch.Tensor:
    with tierstore.load(model, Budget("4MiB"), device="cpu", **how) as session, torch.no_grad():
        return session.module(PROMPT).logits  # type: ignore[no-any-return]


# ---- what users do


def test_pack_verify_info_and_generate(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--format", "int4", "--formats", "lm_head*=int8", "--formats", "*down_proj*=keep", "--device", "cpu")
    ran = run("pack", tiny_checkpoint, out, *options)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{out}: ")
    assert "bound by " in ran.out
    again = run("pack", tiny_checkpoint, out, *options)
    assert (again.code, again.out.split(":")[0]) == (0, f"{out} was packed before")

    ran = run("verify", out)
    assert ran.code == 0
    assert "every checksum is right" in ran.out

    ran = run("info", out)
    assert ran.code == 0
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines() if line}
    assert rows["model.layers.*.mlp.up_proj.weight"][1:3] == ["int4", "4"]
    assert rows["model.layers.*.mlp.down_proj.weight"][1:3] == ["keep", "4"]
    assert rows["lm_head.weight"][1:3] == ["int8", "1"]
    assert 0.05 < float(rows["model.layers.*.mlp.up_proj.weight"][-1]) < 0.1

    ran = run("generate", out, "--prompt", "hello", "--hbm", "4MiB", "--max-new-tokens", "6", "--json")
    assert ran.code == 0
    report = json.loads(ran.out)["report"]
    assert 0 < report["peak_bytes"]["hbm"] <= 4 << 20


def test_json_says_everything(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = json.loads(run("pack", tiny_checkpoint, out, "--format", "int8", "--device", "cpu", "--json").out)
    stored = sum(file.stat().st_size for file in out.glob("weights.zarr/*/c/0"))
    assert said["nbytes"] == stored
    assert said["ratio"] == pytest.approx(stored / said["source_nbytes"])
    assert said["bound"] in said["steps"]
    assert all(step["nbytes"] > 0 and step["seconds"] > 0 for step in said["steps"].values())

    store = json.loads(run("info", out, "--json").out)["store"]
    assert (store["nbytes"], store["source_nbytes"]) == (said["nbytes"], said["source_nbytes"])
    assert store["source"]["model"] == "LlamaForCausalLM"
    by_name = {tensor["name"]: tensor for tensor in store["tensors"]}
    assert by_name["model.layers.0.mlp.up_proj.weight"]["format"] == "int8"
    assert 0.001 < by_name["model.layers.0.mlp.up_proj.weight"]["relative_error"] < 0.01
    assert by_name["model.norm.weight"]["relative_error"] is None
    assert sum(tensor["source_nbytes"] for tensor in store["tensors"]) == said["source_nbytes"]

    assert json.loads(run("verify", out, "--json").out) == {"path": str(out), "nbytes": stored, "faults": []}


def test_what_goes_along_with_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    for name in ("LICENSE.txt", "own.py", "pytorch_model.bin", "chat_template.jinja", "x.index.json", "notes.md"):
        (checkpoint / name).write_text("text")
    pack(checkpoint, tmp_path / "out", format="keep", device="cpu")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "LICENSE.txt", "chat_template.jinja"} <= names
    assert not names & {"own.py", "pytorch_model.bin", "x.index.json", "model.safetensors", "notes.md"}
    pack(checkpoint, tmp_path / "trusted", format="keep", device="cpu", trust_remote_code=True)
    assert (tmp_path / "trusted" / "own.py").exists()


def test_a_gguf_is_imported_and_packed(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.Q8_0.gguf")
    done = pack(file, tmp_path / "out", format="keep", device="cpu", store=tmp_path / "imported")
    assert any("was imported to" in note for note in done.notes)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert torch.equal(use(tmp_path / "out"), use(file, store=tmp_path / "imported"))


def test_on_a_terminal_a_bar_says_how_far_it_is(
    run: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    ran = run("pack", tiny_checkpoint, tmp_path / "out", "--format", "keep", "--device", "cpu")
    assert "MiB" in ran.err
    assert "lm_head.weight" in ran.err
    assert ran.out.startswith(str(tmp_path / "out"))
    assert "verifying" in run("verify", tmp_path / "out").err


def test_a_kept_checkpoint_gives_the_same_numbers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pack(tiny_checkpoint, tmp_path / "out", format="keep", device="cpu")
    assert torch.equal(use(tmp_path / "out"), use(tiny_checkpoint))


def test_the_progress_covers_every_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    done = pack(tiny_checkpoint, tmp_path / "out", format="fp8", device="cpu", progress=seen.append)
    assert [at.done_nbytes for at in seen] == sorted(at.done_nbytes for at in seen)
    assert seen[-1].done_nbytes == seen[-1].total_nbytes == done.source_nbytes
    assert len({at.tensor for at in seen}) == len(seen)


# ---- kills, memory


KILLED = """
import os, signal, sys
from tierstore import packing
packing.UNIT_NBYTES = 1 << 20
left = 20
def progress(at):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
packing.pack(sys.argv[1], sys.argv[2], format="int4", device="cpu", progress=progress)
"""


def test_a_killed_packing_goes_on_and_ends_the_same(
    packed: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny_checkpoint, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    for command in (["generate", out, "--prompt", "hello", "--hbm", "4MiB"], ["info", out], ["verify", out]):
        ran = run(*command)
        assert ran.code == 2
        assert "half packed" in ran.err
    with pytest.raises(StoreIncompleteError, match="half packed"):
        use(out.with_name("out.part"))
    monkeypatch.setattr(packing, "UNIT_NBYTES", 1 << 20)
    seen: list[Progress] = []
    pack(tiny_checkpoint, out, format="int4", device="cpu", progress=seen.append)
    entries = len(json.loads(run("info", out, "--json").out)["store"]["tensors"])
    assert 0 < len(seen) <= entries - 10  # whole units were not made again
    assert files_of(out) == files_of(packed)
    assert not out.with_name("out.part").exists()


MEASURED = """
import resource, sys
from tierstore.packing import pack
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
for form in ("fp8", "int8"):
    pack(sys.argv[1], sys.argv[3] + form, format=form, device="cpu")
before = most()
pack(sys.argv[2], sys.argv[3], format="fp8", device="cpu")
print(most() - before)
"""


def test_memory_does_not_grow_with_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    large = write_large(tmp_path / "large", layers=44)
    assert sum(file.stat().st_size for file in large.iterdir()) > 280 << 20
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, tiny_checkpoint, large, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) < 64 << 20  # its largest tensor has 8 MiB


def write_large(folder: Path, layers: int) -> Path:
    """A bfloat16 Llama of about 6.5 MiB a layer, written without ever being a model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    noise = torch.randn(1 << 22).to(torch.bfloat16)
    tensors = {name: noise[: t.numel()].view(t.shape).clone() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- what is refused, with nothing half done


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "int3"], "no format is called 'int3': choose one of int8"),
        (["--formats", "lm_head"], "write PATTERN=FORMAT"),
        (["--formats", "lm_head=int3"], "no format is called 'int3'"),
        (["--formats", "no_such_layer*=int8"], "'no_such_layer*' matches no parameter"),
        (["--dtype", "float99"], "dtype"),
        (["--device", "abacus"], "'abacus' is not a device"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(
    run: Any, tiny_checkpoint: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    ran = run("pack", tiny_checkpoint, tmp_path / "out", *options)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("tierstore: ")
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["", "out", "deep/er"])
def test_the_checkpoint_is_never_written_to(run: Any, tiny_checkpoint: Path, inside: str) -> None:
    before = files_of(tiny_checkpoint)
    ran = run("pack", tiny_checkpoint, tiny_checkpoint / inside)
    assert ran.code == 2
    assert "is in the checkpoint" in ran.err
    assert files_of(tiny_checkpoint) == before


def test_a_packed_store_is_no_checkpoint_to_pack(run: Any, packed: Path, tmp_path: Path) -> None:
    ran = run("pack", packed, tmp_path / "out")
    assert ran.code == 2
    assert "is packed already" in ran.err


def test_what_is_there_already_is_not_touched(run: Any, tiny_checkpoint: Path, copied: Path, tmp_path: Path) -> None:
    before = files_of(copied)
    with pytest.raises(StoreMismatchError, match="another packed store"):
        pack(tiny_checkpoint, copied, format="int8", device="cpu")
    assert files_of(copied) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("text")
    ran = run("pack", tiny_checkpoint, other)
    assert ran.code == 2
    assert files_of(other) == {"thesis.txt": b"text"}


def test_weights_that_are_no_numbers_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModuleError, match=r"model\.layers\.2\.mlp\.up_proj\.weight cannot be packed as int4: 1 of "):
        pack(checkpoint, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(tierstore.errors.StoreError):
        pack(checkpoint, tmp_path / "out", device="cpu")
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        pack(checkpoint, tmp_path / "out", device="cpu")


def test_a_full_disk_leaves_what_a_later_packing_goes_on_with(
    packed: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(packing, "UNIT_NBYTES", 1 << 20)
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", full_after(1 << 20))
        with pytest.raises(StoreFullError, match="out"):
            pack(tiny_checkpoint, out, format="int4", device="cpu")
    assert not out.exists()
    pack(tiny_checkpoint, out, format="int4", device="cpu")
    assert files_of(out) == files_of(packed)


def full_after(nbytes: int) -> Callable[..., int]:
    left, write = nbytes, os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(28, "No space left on device")
        return write(fd, data, offset)

    return pwrite


# ---- stores that are damaged


def test_a_flipped_bit_is_found_by_load_and_by_verify(run: Any, copied: Path) -> None:
    file = copied / UNIT
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ChecksumError, match="CRC32C"):
        use(copied)
    ran = run("verify", copied)
    assert ran.code == 1
    assert "CRC32C" in ran.out
    assert str(file) in ran.out
    ran = run("generate", copied, "--prompt", "hello", "--hbm", "4MiB")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert len(json.loads(run("verify", copied, "--json").out)["faults"]) == 1


def test_a_missing_unit(run: Any, copied: Path) -> None:
    (copied / UNIT).unlink()
    with pytest.raises(StoreIncompleteError, match="missing"):
        use(copied)
    assert run("verify", copied).code == 1
    assert run("info", copied).code == 0  # the manifest is there


def test_a_manifest_of_a_newer_release(run: Any, copied: Path) -> None:
    file = copied / MANIFEST
    file.write_text(file.read_text().replace('"layout_version": 2', '"layout_version": 7'))
    with pytest.raises(StoreFormatError, match="upgrade tierstore"):
        use(copied)
    for command in ("info", "verify"):
        ran = run(command, copied)
        assert (ran.code, "upgrade tierstore" in ran.err) == (2, True)


def test_a_config_of_another_model(copied: Path) -> None:
    file = copied / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="of another model"):
        use(copied)


def test_verify_and_info_of_what_is_no_store(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    ran = run("verify", tiny_checkpoint)
    assert ran.code == 2
    assert "give the folder of a packed store" in ran.err
    assert run("verify", tmp_path / "none").code == 2
    assert "disk to RAM" in run("info", tiny_checkpoint).out
