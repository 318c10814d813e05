"""Opens a model for a job: memory divided, the model loaded and measured, and a plan made for its batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierstore.backends import Backend
from tierstore.batch_plan import CPU_TOKENS, CUDA_TOKENS, BatchCosts, BatchPlan, BatchRoom, KvTier, build_batch_plan
from tierstore.batch_schedule import Limits
from tierstore.budget import Budget
from tierstore.composing import TYPICAL_LINKS
from tierstore.drafting import PassCost
from tierstore.errors import CheckpointError, DeviceError, ModuleError
from tierstore.jobs.drafts import Drafting, LookupDrafter
from tierstore.jobs.encoding import Encoder, end_tokens
from tierstore.jobs.engine import Counts, Engine
from tierstore.jobs.probing import probe
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.rows import Row
from tierstore.jobs.samples import Failed, Finished
from tierstore.jobs.settings import JobSettings
from tierstore.jobs.splitting import KvNeeds, split_budget
from tierstore.jobs.workload import Workload
from tierstore.loading import load_divided

if TYPE_CHECKING:
    from tierstore.hf.batch.slices import Capacity
    from tierstore.hf.checkpoint import Checkpoint
    from tierstore.hf.kv.memory import KvMemory
    from tierstore.report.report import Report
    from tierstore.session import Session


@dataclass(frozen=True)
class OpenJob:
    """``engine`` answers rows with the model in ``session``, in batches as in ``plan``. ``notes`` say what was decided,
    and why."""

    engine: Engine
    session: Session
    plan: BatchPlan
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.plan.tokens

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self.engine.counts

    @property
    def moved_nbytes(self) -> int:
        """Bytes of weights moved so far."""
        return self.session.report().bytes_moved

    def report(self) -> Report:
        """What moved, and what it cost."""
        return self.session.report()

    def answer(
        self, prompts: PromptFile, skip: Callable[[int], bool], missing: Callable[[Row], Sequence[int]]
    ) -> Iterator[list[Finished | Failed]]:
        """``engine.answer`` for the rows of ``prompts``, but for those in lines to ``skip``."""
        return self.engine.answer(prompts.rows(skip), missing)


@contextmanager
def open_job(settings: JobSettings, workload: Workload, *, tokens: int | None = None) -> Iterator[OpenJob]:
    """A job within the ``with``, at whose end everything is released. ``tokens`` of a micro-batch are those of an
    earlier run of the job, None where there was none.

    Raises what ``tierstore.load`` raises, ``PlanError`` where no KV cache fits beside the weights, and ``DeviceError``
    for what is asked for and cannot be had."""
    if settings.draft is not None:
        raise DeviceError("a draft model cannot be used yet: leave draft out, and let the text itself suggest tokens")
    opening = _Opening(settings, workload)
    with load_divided(
        settings.model,
        settings.budget,
        opening.divide,
        device=settings.device,
        dtype=settings.dtype,
        kv_format=settings.kv_format,
        store=settings.store,
        trust_remote_code=settings.trust_remote_code,
    ) as session:
        yield opening.finish(session, settings.tokens if tokens is None else tokens)


class _Opening:
    """What is known of a job while its model is being opened."""

    def __init__(self, settings: JobSettings, workload: Workload) -> None:
        self._settings, self._workload = settings, workload
        self._notes: list[str] = []
        self._why_alone = ""

    def divide(self, checkpoint: Checkpoint, backend: Backend) -> Budget:
        """The budget, with bytes for a KV cache in pages where the user gave it none and the model can use one."""
        from tierstore.hf.batch.support import why_not_tokens
        from tierstore.hf.kv.memory import PAGE_TOKENS, page_kinds
        from tierstore.hf.kv.shapes import dtype_of, layers_of
        from tierstore.hf.tokenizer import load_tokenizer
        from tierstore.kvformats.named import kv_format

        settings, module = self._settings, checkpoint.module
        config: Any = module.config
        text = config.get_text_config(decoder=True)
        tokenizer = load_tokenizer(checkpoint.path, settings.trust_remote_code)
        self._encoder = Encoder(tokenizer, text.vocab_size, settings.chat)
        if settings.chat and getattr(tokenizer, "chat_template", None) is None:
            raise CheckpointError(f"chat is asked for, and the tokenizer of {checkpoint.path} has no chat template")
        self._unified = backend.engine.unified
        self._ends = end_tokens(module, tokenizer)
        self._positions: int | None = getattr(text, "max_position_embeddings", None)
        self._job, longest = self._workload.measure(self._encoder, PAGE_TOKENS, self._positions)
        self._why_alone = why_not_tokens(module)
        budget = settings.budget
        if budget.kv_hbm or self._why_alone:
            return budget
        dtype = dtype_of(module)
        kinds = page_kinds(layers_of(module), dtype, kv_format(settings.kv_format, dtype))
        needs = KvNeeds(
            kinds,
            self._job.sequences if settings.sequences is None else min(self._job.sequences, settings.sequences),
            self._job.prompt_tokens + self._job.new_tokens,
            longest,
            sum(piece.extent.nbytes for pieces in checkpoint.pieces.values() for piece in pieces),
        )
        split = split_budget(needs, budget.hbm, budget.ram, budget.kv_nvme, unified=backend.engine.unified)
        self._notes.append(split.reason)
        return Budget(
            split.hbm, split.ram, budget.nvme, kv_hbm=split.kv_hbm, kv_ram=split.kv_ram, kv_nvme=budget.kv_nvme
        )

    def finish(self, session: Session, tokens: int | None) -> OpenJob:
        """The job in ``session``, with micro-batches of ``tokens`` tokens, or as many as are fastest."""
        from tierstore.hf.batch.support import why_not_exact
        from tierstore.hf.batch.tokens import TokenModel

        settings = self._settings
        if self._why_alone:
            raise ModuleError(self._why_alone)
        memory = session.kv.memory
        sizes = (tokens,) if tokens is not None else CPU_TOKENS if memory.device.type == "cpu" else CUDA_TOKENS
        model = TokenModel(session.module, memory, session.together, tokens=sizes[0])
        costs = probe(model, session, sizes, vocabulary=self._encoder.vocabulary, positions=self._positions)
        room = BatchRoom(
            model.capacity.page_tokens, model.capacity.open_pages, _tiers(memory, model.capacity, self._unified)
        )
        plan = build_batch_plan(costs, self._job, room)
        model.tokens = plan.tokens
        engine = Engine(
            model,
            self._encoder,
            limits=Limits(
                plan.tokens,
                plan.micro_batches,
                min(plan.sequences, settings.sequences or plan.sequences),
                model.capacity.page_tokens,
                model.capacity.pages,
                model.capacity.open_pages,
            ),
            ends=self._ends,
            positions=self._positions,
            seed=settings.seed,
            drafting=self._drafting(costs, plan),
        )
        if why := why_not_exact(session.module):
            self._notes.append(f"a text may depend, in the last bits of its logits, on others of its batch: {why}")
        return OpenJob(engine, session, plan, (*self._notes, *plan.explain().splitlines()))

    def _drafting(self, costs: BatchCosts, plan: BatchPlan) -> Drafting | None:
        if self._settings.speculate == "off":
            return None
        cost = PassCost(
            plan.tokens,
            plan.micro_batches,
            costs.compute_seconds[plan.tokens],
            costs.transfer_seconds,
            costs.overhead_seconds,
        )
        return Drafting(LookupDrafter(), cost, always=self._settings.speculate == "lookup")


def _tiers(memory: KvMemory, capacity: Capacity, unified: bool) -> list[KvTier]:
    """The pages of the kind of layers that has the fewest, and what those that are not read in place take."""
    plans = memory.plan.kinds
    nbytes = sum(plan.kind.page_nbytes for plan in plans)
    hbm, ram, nvme = next(plan.tier_pages for plan in plans if plan.pages == capacity.pages)
    slow = 0.0 if unified else nbytes / TYPICAL_LINKS.ram_bytes_per_second
    return [
        KvTier(hbm),
        KvTier(ram, slow),
        KvTier(nvme, nbytes / TYPICAL_LINKS.nvme_bytes_per_second),
    ]


def model_facts(model: str | os.PathLike[str]) -> dict[str, Any]:
    """What tells a checkpoint from others, without reading its weights: the names and sizes of its files.

    Raises ``CheckpointError`` where there is none."""
    path = Path(model)
    if not path.exists():
        raise CheckpointError(f"{str(path)!r} does not exist: give the folder of a checkpoint, or a .gguf file")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return {"path": str(path.resolve()), "files": {file.name: file.stat().st_size for file in files}}
