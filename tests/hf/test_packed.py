"""A packed store opens as the module it was packed from, with the same ties, buffers and, but for rounding, values."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tierstore
from tests.hf.test_checkpoint import OWN_CODE, change_config
from tests.hf.zoo import ZOO, named_tensors, save, tiny
from tierstore import Budget
from tierstore.backends import Backend, backend_for
from tierstore.contracts import ReadRequest
from tierstore.errors import CheckpointError, PlanError, StoreFormatError
from tierstore.formats.format import unpack_tensor
from tierstore.formats.named import FORMATS, format_named
from tierstore.formats.packed import PackedTensor
from tierstore.hf.checkpoint import Checkpoint
from tierstore.hf.packed import open_packed
from tierstore.hf.source import open_source
from tierstore.measuring import SLOWEST_COMPUTE, measure_compute
from tierstore.packing import pack
from tierstore.stores.packed import PackedStore
from tierstore.tensors import KEEP
from tierstore.testing.adversary import Adversary, adversary

_WIDE = {"hidden_size": 256, "intermediate_size": 512}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _WIDE,
    "Qwen2ForCausalLM": _WIDE,  # tied
    "MixtralForCausalLM": {"hidden_size": 128, "intermediate_size": 256},  # experts in a stack
    "DeepseekV3ForCausalLM": _WIDE,  # a buffer that is stored
    "GPT2LMHeadModel": {"n_embd": 256},  # weights [in, out]
    "T5ForConditionalGeneration": {"d_model": 256, "d_ff": 512},  # a table with three holders
    "MarianMTModel": {"d_model": 256},  # parameters that are computed, and stored here
    "MambaForCausalLM": {"hidden_size": 256},  # convolutions, and matrices that no linear layer holds
}
TOKENS = torch.arange(3, 11).view(2, 4)
Make = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a tiny checkpoint and the packed store that was made of it. Read only."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str, form: str = "int4", dtype: torch.dtype = torch.bfloat16, **how: Any) -> tuple[Path, Path]:
        key = f"{name} {form} {dtype} {how}"
        if key not in made:
            folder = tmp_path_factory.mktemp("packed")
            checkpoint = save(tiny(name, **MODELS[name]), folder / "checkpoint", dtype)
            pack(checkpoint, folder / "out", format=form, device="cpu", **how)
            made[key] = checkpoint, folder / "out"
        return made[key]

    return make


@pytest.fixture
def opened() -> Iterator[Callable[..., Checkpoint]]:
    with ExitStack() as stores:

        def open_one(*args: Any, **kwargs: Any) -> Checkpoint:
            checkpoint = open_packed(*args, **kwargs)
            stores.callback(checkpoint.store.close)
            return checkpoint

        yield open_one


def read_stored(out: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a packed store, by stored name."""
    store = PackedStore(out)
    values = {}
    for name, spec in store.specs.items():
        (piece,) = store.pieces(name)
        flat = torch.empty(spec.nbytes, dtype=torch.uint8)
        store.read([ReadRequest(piece.file, piece.extent, flat)]).wait()
        values[name] = flat.view(getattr(torch, spec.dtype)).view(spec.shape)
    store.close()
    return values


def unpacked(out: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a packed store as its format has kept it, in its own dtype or in ``dtype`` where it is packed."""
    store = PackedStore(out)
    store.close()
    stored = read_stored(out)
    values = {}
    for name, entry in store.manifest.tensors.items():
        if entry.format == KEEP:
            values[name] = stored[name]
        else:
            parts = {part.name: stored[f"{name}.{part.name}"] for part in entry.parts}
            form, into = format_named(entry.format), dtype or getattr(torch, entry.dtype)
            values[name] = unpack_tensor(form, parts, entry.shape, into)
    return values


def plain_model(checkpoint: Path, out: Path) -> Any:
    """What from_pretrained gives, with the weights that the packed store has."""
    named = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, named).from_pretrained(checkpoint)
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, value in unpacked(out).items():
            tensors[name].copy_(value)
    return model


def tied_groups(module: torch.nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def run(model: Any) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    with torch.no_grad():
        return model(**inputs)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ZOO)
def test_opens_as_the_module_it_was_packed_from(name: str, tmp_path: Path, opened: Any) -> None:
    checkpoint, out = save(tiny(name), tmp_path / "checkpoint"), tmp_path / "out"
    pack(checkpoint, out, format="keep", device="cpu")
    source, packed = open_source(checkpoint), opened(out)
    source.store.close()
    want: Any = source.module
    have: Any = packed.module
    assert type(have) is type(want)
    assert have.training is False
    assert have.config.to_dict() == {**want.config.to_dict(), "_name_or_path": str(out)}
    if want.can_generate():
        assert have.generation_config.to_dict() == want.generation_config.to_dict()
    assert tied_groups(have) == tied_groups(want)
    theirs = named_tensors(want)
    assert {n: (t.shape, t.dtype) for n, t in named_tensors(have).items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    assert packed.pieces.keys() | packed.ready.keys() == theirs.keys()
    assert not packed.pieces.keys() & packed.ready.keys()
    assert all(torch.equal(value, source.ready[name]) for name, value in packed.ready.items())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_stored_is_what_the_checkpoint_holds(name: str, make: Make) -> None:
    checkpoint, out = make(name)
    values = unpacked(out, torch.float32)
    source = open_source(checkpoint)
    with closing(PackedStore(out)) as store, closing(source.store):
        entries = store.manifest.tensors
        assert any(entry.format != KEEP for entry in entries.values())
        for name, entry in entries.items():
            want, have = source.read(name), values[name]
            assert (entry.dtype, entry.shape) == (str(want.dtype)[6:], tuple(want.shape))
            if entry.format == KEEP:
                assert torch.equal(have, want)
                assert entry.relative_error is None
            else:
                error = float((have - want.float()).norm() / want.float().norm())
                assert entry.relative_error == pytest.approx(error, rel=1e-4)


@pytest.fixture(params=["cpu", "adversary-1", "adversary-2"])
def make_backend(request: pytest.FixtureRequest) -> Iterator[Callable[[], Backend]]:
    made: list[Adversary] = []

    def make() -> Backend:
        if request.param == "cpu":
            return backend_for("cpu")
        adverse = adversary(int(request.param[-1]) + 100 * len(made))
        made.append(adverse)
        return Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool)

    yield make
    for adverse in made:
        adverse.engine.check()


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_the_plain_model_s_under_any_budget(
    name: str, make: Make, make_backend: Callable[[], Backend]
) -> None:
    checkpoint, out = make(name)
    want = run(plain_model(checkpoint, out))
    found = []
    nbytes = sum(value.nbytes for value in read_stored(out).values())
    for hbm, ram in ((0.0, 0.5), (0.5, 0.3), (1.5, 1.0)):
        budget = Budget(least(out) + int(nbytes * hbm), int(nbytes * ram))
        with tierstore.load(out, budget, backend=make_backend()) as session:
            found += [run(session.module), run(session.module)]
            report = session.report()
        assert report.bytes_moved > 0
        assert report.peak_bytes["hbm"] <= budget.hbm
        assert report.peak_bytes["nvme"] == 0
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert float((found[0] - want).norm() / want.norm()) < 0.02


def least(out: Path) -> int:
    """A budget that is tight for a packed store: what one operation needs, and a half."""
    with pytest.raises(PlanError) as refused:
        tierstore.load(out, Budget(1), device="cpu")
    return refused.value.needed * 3 // 2


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_loads_and_generates(form: str, make: Make) -> None:
    checkpoint, out = make("LlamaForCausalLM", form, torch.float32)
    plain = plain_model(checkpoint, out)
    want = run(plain)
    for extra in (0, 1 << 20):
        with tierstore.load(out, Budget(least(out) + extra), device="cpu") as session:
            packed = [p for p in session.module.parameters() if isinstance(p, PackedTensor)]
            assert packed
            assert float((run(session.module) - want).norm() / want.norm()) < 0.01
            model: Any = session.module
            mask = torch.ones_like(TOKENS)
            tokens = [
                m.generate(TOKENS, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (model, plain)
            ]
            assert torch.equal(*tokens)


def test_resident_weights_stay_packed_and_are_counted_so(make: Make) -> None:
    _, out = make("LlamaForCausalLM")
    nbytes = sum(value.nbytes for value in read_stored(out).values())
    with tierstore.load(out, Budget("1MiB"), device="cpu") as session:
        run(session.module)
        assert session.plan.share == 1
        assert session.plan.resident_nbytes[tierstore.Tier.HBM] == nbytes
        assert any(isinstance(parameter, PackedTensor) for parameter in session.module.parameters())


@pytest.mark.parametrize("form", FORMATS)
def test_compute_is_measured_in_packed_bytes(form: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan for a large model believes of this machine: about as many weights a second as the machine has."""
    _, out = make("LlamaForCausalLM", form, torch.float32)
    budget = Budget(least(out))
    asked: list[Any] = []

    def measure(dtype: torch.dtype, device: torch.device, found: Any) -> float:
        asked.append((dtype, found.name, measure_compute(dtype, device, found)))
        return cast(float, asked[-1][-1])

    monkeypatch.setattr("tierstore.loading.MEASURED_FROM", 0)
    monkeypatch.setattr("tierstore.loading.measure_compute", measure)
    with tierstore.load(out, budget, device="cpu") as session:
        assert session.plan.bound
    ((dtype, found, rate),) = asked
    assert (dtype, found) == (torch.float32, form)
    nbytes = sum(part.nbytes for part in FORMATS[form].parts(64, 2048))
    assert rate >= SLOWEST_COMPUTE * nbytes / (64 * 2048 * 4)


def test_rows_of_a_large_table_are_read_from_disk(tmp_path: Path) -> None:
    checkpoint = save(tiny("LlamaForCausalLM", vocab_size=40_000), tmp_path / "checkpoint")
    out = tmp_path / "out"
    pack(checkpoint, out, format="int8", formats={"lm_head": "int4"}, device="cpu")
    store = PackedStore(out)
    store.close()
    table = store.manifest.tensors["model.embed_tokens.weight"]
    assert table.format == "int8"
    with tierstore.load(out, Budget("3MiB"), device="cpu") as session:
        want = [run(session.module), run(session.module)]
        moved = session.report().bytes_moved
        run(session.module)
        moved = session.report().bytes_moved - moved
    passed = sum(entry.nbytes for entry in store.manifest.tensors.values() if entry is not table)
    assert moved < passed + table.nbytes // 4
    with tierstore.load(out, Budget("16MiB"), device="cpu") as session:
        assert torch.equal(run(session.module), want[0])
    assert torch.equal(want[0], want[1])


@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_those_of_the_checkpoint(tied: bool, tmp_path: Path) -> None:
    """Names that a model ties are untied where the checkpoint has another value for each."""
    checkpoint, out = save(tiny("Qwen2ForCausalLM"), tmp_path / "checkpoint"), tmp_path / "out"
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if tied else 1)
    save_file(tensors, file, metadata={"format": "pt"})
    pack(checkpoint, out, format="int4", device="cpu")
    with tierstore.load(out, Budget("1MiB"), device="cpu") as session:
        model: Any = session.module
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert ("lm_head.weight" in model.all_tied_weights_keys) is tied
        have = run(model)
    want = run(plain_model(checkpoint, out))
    assert float((have - want).norm() / want.norm()) < 0.02  # compiled products round their input


def test_dtype_is_the_one_that_was_packed(tmp_path: Path, make: Make, opened: Any) -> None:
    checkpoint, _ = make("LlamaForCausalLM")
    pack(checkpoint, tmp_path / "out", format="int8", dtype=torch.float32, device="cpu")
    for dtype in (None, "auto", "float32", torch.float32):
        module = opened(tmp_path / "out", dtype=dtype).module
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    with pytest.raises(CheckpointError, match=r"packed from float32 weights, dtype='bfloat16' .* --dtype bfloat16"):
        opened(tmp_path / "out", dtype=torch.bfloat16)


def test_another_class_than_the_usual_is_found_again(tmp_path: Path, opened: Any) -> None:
    checkpoint = save(tiny("Qwen2ForCausalLM").model, tmp_path / "checkpoint")
    pack(checkpoint, tmp_path / "out", device="cpu", model_class=transformers.AutoModelForCausalLM)
    assert type(opened(tmp_path / "out").module) is transformers.Qwen2ForCausalLM
    with pytest.raises(CheckpointError, match=r"lacks 26 tensors of Qwen2Model: .* model_class is another"):
        opened(tmp_path / "out", model_class=transformers.Qwen2Model)


def test_code_of_its_own_runs_when_asked(tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
    checkpoint, out = save(tiny("LlamaForCausalLM"), tmp_path / "checkpoint"), tmp_path / "out"
    file = checkpoint / "model.safetensors"
    extra = {"extra.weight": torch.randn(64, 64).to(torch.bfloat16), "extra.bias": torch.ones(64).to(torch.bfloat16)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    (checkpoint / "own.py").write_text(OWN_CODE)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change_config(checkpoint, model_type="own", auto_map=names)
    pack(checkpoint, out, device="cpu", trust_remote_code=True)
    packed = opened(out, trust_remote_code=True)
    assert type(packed.module).__name__ == "OwnForCausalLM"
    assert "extra.weight" in packed.packed
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        opened(out)


class TestOtherModels:
    """A store whose config.json is not the one it was packed with is refused with the names that differ."""

    @pytest.fixture
    def out(self, make: Make, tmp_path: Path) -> Path:
        _, out = make("LlamaForCausalLM")
        for file in out.rglob("*"):
            copied = tmp_path / file.relative_to(out)
            copied.mkdir(parents=True, exist_ok=True) if file.is_dir() else copied.write_bytes(file.read_bytes())
        return tmp_path

    def test_more_layers(self, out: Path, opened: Any) -> None:
        change_config(out, num_hidden_layers=3)
        with pytest.raises(CheckpointError, match=r"lacks 9 tensors .*model\.layers\.2\."):
            opened(out)

    def test_fewer_layers(self, out: Path, opened: Any) -> None:
        change_config(out, num_hidden_layers=1)
        with pytest.raises(CheckpointError, match=r"holds 9 tensors that LlamaForCausalLM has not: model\.layers\.1\."):
            opened(out)

    def test_other_shapes(self, out: Path, opened: Any) -> None:
        change_config(out, vocab_size=128)
        with pytest.raises(
            CheckpointError, match=r"embed_tokens.weight is bfloat16 \(96, 256\), .* needs .* \(128, 256\)"
        ):
            opened(out)

    def test_another_dtype(self, out: Path, opened: Any) -> None:
        change_config(out, dtype="float32")
        with pytest.raises(CheckpointError, match=r"is bfloat16 .*, LlamaForCausalLM needs float32"):
            opened(out)

    def test_parts_of_another_format(self, out: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tierstore.hf.packed.format_named", lambda name: FORMATS["int8-row"])
        with pytest.raises(StoreFormatError, match="codes"):
            opened(out)
