"""Opens a model for a job: memory divided, the model loaded and measured, and a plan made for its batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tierstore.backends import Backend
from tierstore.batch_plan import BatchPlan
from tierstore.budget import Budget
from tierstore.errors import CheckpointError, ModuleError, PlanError
from tierstore.jobs.draft_model import OpenDraft, beside, open_draft
from tierstore.jobs.drafts import Drafting, ModelDrafter
from tierstore.jobs.encoding import Encoder, end_tokens, special_tokens
from tierstore.jobs.engine import Counts, Engine
from tierstore.jobs.hidden_states import StatesRoom, room_for_states
from tierstore.jobs.models import Prepared, divide_alone, prepare_alone, prepare_side_by_side
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.rows import Row
from tierstore.jobs.samples import Failed, Finished
from tierstore.jobs.settings import JobSettings
from tierstore.jobs.splitting import KvNeeds, check_kv, split_budget
from tierstore.jobs.workload import Workload
from tierstore.loading import load_divided

if TYPE_CHECKING:
    from tierstore.hf.checkpoint import Checkpoint
    from tierstore.report.report import Report
    from tierstore.session import Session

MAY_DEPEND = "the last bits of a text's logits may depend on its batch"


@dataclass(frozen=True)
class OpenJob:
    """``engine`` answers rows with the model in ``session``, in batches as in ``plan``; micro-batches have ``tokens``.
    ``notes`` say what was decided, and why."""

    engine: Engine
    session: Session
    plan: BatchPlan
    tokens: int
    notes: tuple[str, ...]

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

    Raises what ``tierstore.load`` raises, ``PlanError`` where no KV cache fits beside the weights, and ``ModuleError``
    for what the model cannot do."""
    with ExitStack() as closing:
        opening = _Opening(settings, workload, closing)
        try:
            session = load_divided(
                settings.model,
                settings.budget,
                opening.divide,
                device=settings.device,
                dtype=settings.dtype,
                kv_format=settings.kv_format,
                store=settings.store,
                trust_remote_code=settings.trust_remote_code,
            )
        except PlanError as error:
            raise beside(error, opening.draft) from error
        closing.enter_context(session)
        yield opening.finish(session, settings.tokens if tokens is None else tokens)


class _Opening:
    """What is known of a job while its model is being opened. ``closing`` closes what is opened besides."""

    def __init__(self, settings: JobSettings, workload: Workload, closing: ExitStack) -> None:
        self._settings, self._workload, self._closing = settings, workload, closing
        self._notes: list[str] = []
        self._states: StatesRoom | None = None
        self.draft: OpenDraft | None = None

    def divide(self, checkpoint: Checkpoint, backend: Backend) -> Budget:
        """The budget, with bytes for a KV cache in pages where the user gave it none and the model can use one."""
        from tierstore.hf.batch.support import why_not_tokens
        from tierstore.hf.kv.memory import PAGE_TOKENS, page_kinds
        from tierstore.hf.kv.shapes import WITHOUT, dtype_of, layers_of
        from tierstore.hf.tokenizer import load_tokenizer
        from tierstore.kvformats.named import kv_format

        settings, module = self._settings, checkpoint.module
        config: Any = module.config
        text = config.get_text_config(decoder=True)
        tokenizer = load_tokenizer(checkpoint.path, settings.trust_remote_code)
        self._encoder = Encoder(tokenizer, text.vocab_size, settings.chat, special_tokens(tokenizer))
        if settings.chat and getattr(tokenizer, "chat_template", None) is None:
            raise CheckpointError(f"chat is asked for, and the tokenizer of {checkpoint.path} has no chat template")
        self._ends = end_tokens(module, tokenizer)
        self._positions: int | None = getattr(text, "max_position_embeddings", None)
        self._unified = backend.engine.unified
        self._job, longest = self._workload.measure(self._encoder, PAGE_TOKENS, self._positions)
        self._alone = why_not_tokens(module)
        budget, form = self._beside_draft(longest), settings.kv_format
        sequences = min(self._job.sequences, settings.sequences or self._job.sequences)
        weights = [sum(piece.extent.nbytes for piece in pieces) for pieces in checkpoint.pieces.values()]
        if not self._unified:
            self._states = room_for_states(
                budget.hbm,
                budget.ram,
                weights=weights,
                tokens=sequences * self._job.prompt_tokens,
                token_nbytes=int(getattr(text, "hidden_size", 1)) * dtype_of(module).itemsize,
            )
            budget = replace(budget, ram=budget.ram - self._states.host_nbytes)
        if self._alone:
            why = self._alone.removesuffix(f": {WITHOUT}")
            self._notes.append(f"each text is computed by itself, in a call of its own: {why}")
            budget, self._kv_nbytes, reason = divide_alone(
                budget, module, self._job, longest, sequences=sequences, kv_format=form
            )
            self._notes.append(reason)
        elif not budget.kv_hbm:
            kinds = page_kinds(layers_of(module), dtype_of(module), kv_format(form, dtype_of(module)))
            tokens = self._job.prompt_tokens + self._job.new_tokens
            needs = KvNeeds(kinds, sequences, tokens, longest, sum(weights))
            split = split_budget(needs, budget.hbm, budget.ram, budget.kv_nvme, unified=self._unified)
            self._notes.append(split.reason)
            kv: Any = {"kv_hbm": split.kv_hbm, "kv_ram": split.kv_ram, "kv_nvme": budget.kv_nvme}
            budget = Budget(split.hbm, split.ram, budget.nvme, **kv)
        else:
            kinds = page_kinds(layers_of(module), dtype_of(module), kv_format(form, dtype_of(module)))
            check_kv(kinds, longest, budget, unified=self._unified)
        return budget

    def _beside_draft(self, longest: int) -> Budget:
        """The budget without what a draft model takes, which is opened now, where there is one."""
        settings = self._settings
        if settings.draft is None:
            return settings.budget
        if self._alone:
            raise ModuleError(
                f"a draft model cannot be used, as products of one token add up in another order than those of several "
                f"drafted ones, and texts would change: {self._alone}; leave draft out"
            )
        self.draft = self._closing.enter_context(open_draft(settings, self._encoder, self._job, longest))
        self._notes.append(self.draft.note)
        return replace(settings.budget, hbm=settings.budget.hbm - self.draft.nbytes)

    def finish(self, session: Session, tokens: int | None) -> OpenJob:
        """The job in ``session``, with micro-batches of ``tokens`` tokens, or as many as are fastest."""
        from tierstore.hf.batch.widened import why_widened

        settings, known = self._settings, self._encoder.vocabulary
        if self._alone:
            ready = prepare_alone(
                session,
                self._job,
                tokens,
                self._kv_nbytes,
                vocabulary=known,
                positions=self._positions,
                states=self._states,
                sequences=settings.sequences,
                closing=self._closing,
            )
        else:
            sizes = None if tokens is None else (tokens,)
            ready = prepare_side_by_side(
                session,
                self._job,
                sizes,
                vocabulary=known,
                positions=self._positions,
                unified=self._unified,
                states=self._states,
                sequences=settings.sequences,
                closing=self._closing,
            )
            if why := why_widened(session.module):
                self._notes.append(why)
        engine = Engine(
            ready.model,
            self._encoder,
            limits=ready.limits,
            ends=self._ends,
            positions=self._positions,
            seed=settings.seed,
            drafting=self._drafting(ready),
            shares=ready.shares,
            enough=ready.enough or (lambda tokens: session.kv.memory.enough(1, tokens, budget=settings.budget)),
        )
        self._notes += [f"{MAY_DEPEND}: {why}" for why in self._inexact(session, ready)]
        return OpenJob(engine, session, ready.plan, ready.tokens, (*self._notes, *ready.why.splitlines()))

    def _drafting(self, ready: Prepared) -> Drafting | None:
        speculate = self._settings.speculate
        if speculate == "off" or (speculate == "auto" and not ready.exact):
            return None
        if not ready.speculates:
            raise ModuleError(
                "speculate is 'lookup', and drafted tokens cannot be taken back from what this model keeps of a text: "
                "choose 'auto' or 'off'"
            )
        model = None if self.draft is None else ModelDrafter(self.draft.model)
        return Drafting(ready.cost, always=speculate == "lookup", model=model)

    def _inexact(self, session: Session, ready: Prepared) -> Iterator[str]:
        from tierstore.hf.batch.even import even_tokens
        from tierstore.hf.batch.support import why_not_exact

        if why := why_not_exact(session.module):
            yield why
        threads = torch.get_num_threads()
        on_cpu = ready.exact and session.kv.memory.device.type == "cpu"
        if on_cpu and even_tokens(session.module, ready.tokens, threads) != ready.tokens:
            yield (
                f"torch computes the ends of what each of {threads} threads gets by other code, in float32, where "
                f"micro-batches have {ready.tokens} tokens"
            )
        if self._settings.kv_format is not None:
            yield "pages of the KV cache are rounded when they are full, which is sooner or later"
        if self._settings.speculate == "lookup" and not ready.exact:
            yield "products of one token add up in another order than those of several drafted ones"


def model_facts(model: str | os.PathLike[str], written: Collection[Path] = ()) -> dict[str, Any]:
    """What tells a checkpoint from others, without reading its weights: the names and sizes of its files, but for those
    that are ``written`` by the job, which may be in the same folder.

    Raises ``CheckpointError`` where there is none."""
    path = Path(model)
    if not path.exists():
        raise CheckpointError(f"{str(path)!r} does not exist: give the folder of a checkpoint, or a .gguf file")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    files = [file for file in files if file.resolve() not in written]
    return {"path": str(path.resolve()), "files": {file.name: file.stat().st_size for file in files}}
