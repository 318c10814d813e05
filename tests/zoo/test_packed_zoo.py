"""Modules whose weights are packed, offloaded in every way, compute what plain ones with the kept values compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.zoo import captured, changed, control, tensors, torch_classes
from tests.zoo.asking import seeded
from tests.zoo.comparing import leaves_of
from tests.zoo.registry import ENTRIES, Entry, entry, floats
from tests.zoo.runner import LEAST, Need, Setting, budget_of, shape_of
from tests.zoo.test_transformers import MODELS, Keyed
from tierstore import Budget, Session, offload
from tierstore.backends import Backend
from tierstore.binding.inventory import find_entries
from tierstore.formats.packed import PackedTensor
from tierstore.testing.adversary import adversary

FILLS = (captured, changed, control, tensors, torch_classes)  # importing them fills the zoo
FORMATS = ("int4", "int8", "fp8", "fp4")
SETTINGS = tuple(Setting(backend, share) for share in (LEAST, 0.5, 4.0) for backend in ("disk", "kept", "staged"))

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float64: 2e-4}
"""Of what came through packed products, relative to the largest element: another order of sums, through all layers."""

BF16_INSIDE = ("Autocast",)
"""What comes out in float32 and was worked out in bfloat16."""

EXACT = (
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "Conv2d reflect",
    "ConvTranspose2d",
    "Conv3d",
    "BatchNorm2d",
)
"""No product of a packed matrix is among their operations, or it is not a linear layer's."""

CLOSE = (
    "Linear",
    "Linear bfloat16",
    "Linear float16",
    "Embedding",
    "Embedding max_norm",
    "Embedding large",
    "EmbeddingBag",
    "transposed",
    "channels_last parameter",
    "Conv2d channels_last",  # packed values are contiguous, and some CPUs convolve these in another order
    "half",
    "float64",
    "LSTM",
    "GRU bidirectional",
    "LSTMCell",
    "PackedLSTM",
    "MultiheadAttention",
    "MultiheadAttention fast",
    "TransformerEncoderLayer",
    "PaddedEncoder",
    "Transformer",
    "AdaptiveSoftmax",
    "Lists",
    "weight_norm",
    "spectral_norm",
    "HooksReadWeights",
    "TiedEmbedding",
    "TiedBlocks",
    "Captured",
    "CachesView",
    "ReturnsParameters",
    "Generates",
    "Experts",
    "ChangesOrder",
    "Checkpointed",
    "Autocast",
    "GradientInside",
    "Functional",
    "Scripted",
    "BareRoot",
)


@entry(floats(6, 40))
class Stacked(nn.Module):
    """Experts in one tensor of three axes, used one by one, in groups and all at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 40) * 0.1)
        self.down = nn.Parameter(torch.randn(4, 40, 64) * 0.1)
        self.router = nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        for number in range(4):
            mine = chosen == number
            y = nn.functional.linear(x, self.up[number]).relu()
            x = torch.where(mine[:, None], x + nn.functional.linear(y, self.down[number]), x)
        ends = torch.tensor([1, 1, 4, len(x)], dtype=torch.int32)
        grouped: Tensor = nn.functional.grouped_mm(x, self.up.transpose(-2, -1), offs=ends)
        return x + (grouped @ self.up[0]) + torch.bmm(x.expand(4, -1, -1), self.up.mT).mean(0) @ self.down[1].T


# ---- the comparison


@dataclass(frozen=True)
class Outcome:
    """What a module gave without gradients, and with them: also those of its inputs."""

    name: str
    value: Any


def ask(module: nn.Module, of: Entry) -> Iterator[Outcome]:
    inputs = seeded(of.inputs)
    module.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        for number, args in enumerate([*inputs, inputs[0]]):
            with mode():
                torch.manual_seed(7)
                yield Outcome(f"{mode.__name__} {number}", module(*copy.deepcopy(args)))
    if of.grads:
        args = copy.deepcopy(inputs[0])
        wanted = [leaf.requires_grad_() for leaf in leaves_of(list(args)) if leaf.is_floating_point()]
        total: Any = 0
        for tensor in leaves_of(module(*args)):
            if tensor.requires_grad:
                total = total + tensor.double().square().mean()
        if isinstance(total, Tensor):
            torch.autograd.backward(total)
            yield Outcome("gradients", [leaf.grad for leaf in wanted if leaf.grad is not None])


def differences(want: list[Outcome], have: Iterator[Outcome], exact: bool, tolerance: float | None) -> list[str]:
    found = []
    for theirs, mine in zip(want, have, strict=True):
        pairs = zip(leaves_of(theirs.value), leaves_of(mine.value), strict=True)
        for number, (plain, packed) in enumerate(pairs):
            with torch.no_grad():
                plain, packed = plain.detach().clone(), packed.detach().clone()
            same = plain.shape == packed.shape and plain.dtype == packed.dtype
            if same and not (exact and theirs.name != "gradients") and plain.is_floating_point():
                error = (plain.double() - packed.double()).abs().max() if plain.numel() else torch.zeros(())
                same = bool(error <= (tolerance or TOLERANCE[plain.dtype]) * plain.double().abs().max().clamp(min=1e-3))
                told = f"{float(error):.2g} of {float(plain.double().abs().max()):.2g}" if plain.numel() else ""
            else:
                same, told = same and torch.equal(plain, packed), ""
            if not same:
                found.append(f"{theirs.name}[{number}] {told}")
    return found


def need_of(build: Callable[[], nn.Module], formats: dict[str, str]) -> Need:
    """All packed bytes, and an upper bound of what one operation uses: the tensors of a module, without its children's,
    or all of those that torch fuses."""
    module = seeded(build)
    staying = sum(entry.tensor.nbytes for entry in find_entries(module) if entry.stays)
    with offload(module, Budget(1 << 30), formats=formats, device="cpu") as session:
        fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        steps = [
            sum(map(nbytes_of, {id(t): t for t in tensors_of(child, recurse=isinstance(child, fused))}.values()))
            for child in module.modules()
        ]
        return Need(session.report().peak_bytes["hbm"] - staying, staying, max(steps))


def tensors_of(module: nn.Module, *, recurse: bool) -> list[Tensor]:
    return [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]


def nbytes_of(tensor: Tensor) -> int:
    return sum(map(nbytes_of, tensor.parts.values())) if isinstance(tensor, PackedTensor) else tensor.nbytes


@contextmanager
def opened(
    module: nn.Module, setting: Setting, need: Need, formats: dict[str, str], folder: Path
) -> Iterator[tuple[Session, Budget]]:
    budget = budget_of(setting, need)
    if setting.backend == "disk":
        with offload(module, budget, formats=formats, store=folder / "store", device="cpu") as session:
            yield session, budget
        return
    adverse = adversary(setting.seed)
    backend = Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool)
    store = folder / "store" if setting.backend == "staged" else None
    with offload(module, budget, formats=formats, store=store, backend=backend) as session:
        yield session, budget
    adverse.engine.check()


def examine(
    of: Entry, form: str, setting: Setting, folder: Path, *, exact: bool = False, tolerance: float | None = None
) -> list[str]:
    """Every way in which the packed module differs from a plain one with the values that the format kept."""
    module, plain = seeded(of.build), seeded(of.build)
    formats = {"*": form}  # every matrix, however small
    need = need_of(of.build, formats)
    before = shape_of(module)
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    problems = []
    with opened(module, setting, need, formats, folder) as (session, budget):
        packed = {name: p for name, p in module.named_parameters() if isinstance(p, PackedTensor)}
        if not packed:
            problems.append("nothing was packed")
        own = dict(plain.named_parameters())
        with torch.no_grad():
            kept = {name: p.clone() for name, p in packed.items()}
            for name, value in kept.items():
                own[name].copy_(value)
        twin = copy.deepcopy(plain) if of.copies else plain
        problems += differences(list(ask(twin, of)), ask(module, of), exact, tolerance)
        report = session.report()
        if report.peak_bytes["hbm"] > budget.hbm:
            problems.append(f"peak of hbm {report.peak_bytes['hbm']} is over {budget.hbm}")
        if need.movable + need.staying > budget.hbm and not report.bytes_moved:
            problems.append("no byte moved")
    after = shape_of(module)
    problems += [f"{key}: {before[key]} became {after.get(key)}" for key in before if before[key] != after.get(key)]
    stored = setting.backend != "kept"
    for name, p in module.named_parameters():
        if not torch.equal(p, values[name] if stored or name not in kept else kept[name]):
            problems.append(f"{name} did not come back")
    if (folder / "store").exists():
        problems.append("the store was left")
    return problems


NAMES = [*EXACT, *CLOSE, "Stacked"]


@pytest.mark.filterwarnings("ignore")  # what torch says of these modules, plain ones too
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_plain_with_the_kept_values(name: str, tmp_path: Path) -> None:
    number = NAMES.index(name)
    form, setting = FORMATS[number % 4], SETTINGS[number * 4 % len(SETTINGS)]
    tolerance = TOLERANCE[torch.bfloat16] if name in BF16_INSIDE else None
    found = examine(ENTRIES[name], form, setting, tmp_path, exact=name in EXACT, tolerance=tolerance)
    assert found == [], (form, setting)


FAMILIES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",  # its head is its table
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "T5ForConditionalGeneration",
    "ConvNextModel",
    "ViTModel",
    "GPT2LMHeadModel",
)


@pytest.mark.filterwarnings("ignore")  # what transformers says of its configs
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_transformers(name: str, tmp_path: Path) -> None:
    number = FAMILIES.index(name)
    of = Entry(lambda: Keyed(name), lambda: [(MODELS[name][1](),)], grads=number % 2 == 0, copies=False)
    setting = SETTINGS[number * 4 % len(SETTINGS)]
    assert examine(of, FORMATS[number % 4], setting, tmp_path) == [], setting


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_of_transformers(implementation: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        module = Keyed("MixtralForCausalLM")
        model: Any = module.model
        model.set_experts_implementation(implementation)
        return module

    of = Entry(build, lambda: [(MODELS["MixtralForCausalLM"][1](),)], grads=True, copies=False)
    assert examine(of, "int8", Setting("disk", 0.5), tmp_path) == []


def test_the_models_are_there() -> None:
    assert all(hasattr(transformers, name) for name in FAMILIES)
