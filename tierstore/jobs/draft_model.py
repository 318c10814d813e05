"""Opens the small model that drafts for a job, whole in a part of the memory of its large one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierstore.backends import Backend
from tierstore.batch_plan import BatchJob
from tierstore.budget import Budget, Tier, format_nbytes
from tierstore.errors import CheckpointError, ModuleError, PlanError
from tierstore.jobs.encoding import Encoder
from tierstore.jobs.models import token_nbytes
from tierstore.jobs.settings import JobSettings
from tierstore.loading import load_divided
from tierstore.stores.packed import is_packed

if TYPE_CHECKING:
    from tierstore.hf.batch.draft import DraftModel, Model
    from tierstore.hf.checkpoint import Checkpoint
    from tierstore.session import Session

MOST_TEXTS = 32
"""Texts that are drafted for at once: with more of them, passes are full without drafts."""

PART = 4
"""Caches of drafts take up to one part in so many of hbm, but for the first text's."""


@dataclass(frozen=True)
class OpenDraft:
    """``model`` drafts; it takes ``nbytes`` of hbm, of which ``note`` says what for."""

    model: DraftModel
    nbytes: int
    note: str


@contextmanager
def open_draft(settings: JobSettings, encoder: Encoder, job: BatchJob, longest: int) -> Iterator[OpenDraft]:
    """The model of ``settings.draft`` within the ``with``, for texts of up to ``longest`` tokens of ``encoder``.

    Raises what ``tierstore.load`` raises, ``PlanError`` where it does not fit ``hbm`` beside anything else,
    ``CheckpointError`` for one with other tokens, and ``ModuleError`` for one that cannot take tokens back."""
    assert settings.draft is not None, "there is one"
    opening = _Opening(settings, encoder, min(job.sequences, settings.sequences or MOST_TEXTS, MOST_TEXTS), longest)
    with ExitStack() as closing:
        session = closing.enter_context(
            load_divided(
                settings.draft,
                Budget(settings.budget.hbm, nvme=settings.budget.nvme),
                opening.divide,
                device=settings.device,
                dtype=None if is_packed(settings.draft) else settings.dtype,
                store=settings.store,
                trust_remote_code=settings.trust_remote_code,
            )
        )
        opened = opening.finish(session)
        closing.callback(opened.model.close)
        yield opened


class _Opening:
    """What is known of a draft model while it is being opened: ``texts`` it may have at once, of up to ``tokens``."""

    def __init__(self, settings: JobSettings, encoder: Encoder, texts: int, tokens: int) -> None:
        self._settings, self._encoder = settings, encoder
        self._texts, self._tokens = texts, tokens
        self._vocabulary = encoder.vocabulary
        self._weights_nbytes = self._kv_nbytes = 0

    def divide(self, checkpoint: Checkpoint, backend: Backend) -> Budget:
        """All but what the caches need: so that all weights stay, if they can."""
        from tierstore.hf.tokenizer import load_tokenizer

        tokenizer: Any = load_tokenizer(checkpoint.path, self._settings.trust_remote_code)
        if tokenizer.get_vocab() != self._encoder.tokenizer.get_vocab():
            raise CheckpointError(
                f"the draft model {str(checkpoint.path)!r} has other tokens than the model it is to draft for: choose "
                "one of the same family"
            )
        config: Any = checkpoint.module.config
        text = config.get_text_config(decoder=True)
        self._vocabulary = min(self._vocabulary, text.vocab_size)
        self._tokens = min(self._tokens, getattr(text, "max_position_embeddings", None) or self._tokens)
        pieces = sum(piece.extent.nbytes for pieces in checkpoint.pieces.values() for piece in pieces)
        ready = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.ready.values())
        hbm = self._settings.budget.hbm
        self._weights_nbytes = pieces + ready
        each = (self._tokens + 1) * token_nbytes(checkpoint.module)
        self._texts = max(min(self._texts, hbm // PART // max(each, 1)), 1)
        self._kv_nbytes = self._texts * each
        if self._nbytes >= hbm:
            raise self._too_large()
        return Budget(hbm - self._kv_nbytes, nvme=self._settings.budget.nvme)

    def finish(self, session: Session) -> OpenDraft:
        """The model in ``session``, measured."""
        from tierstore.hf.batch.draft import DraftModel

        if any(tier != Tier.HBM for tier in session.plan.tier.values()):
            raise self._too_large()
        model = DraftModel(
            _model_of(session, self._texts, self._tokens),
            sequences=self._texts,
            tokens=self._tokens,
            vocabulary=self._vocabulary,
        )
        model.measure()
        texts = "1 text" if self._texts == 1 else f"{self._texts} texts"
        note = (
            f"a draft model takes {format_nbytes(self._nbytes)} of hbm, {format_nbytes(self._kv_nbytes)} of it for the "
            f"caches of {texts} of up to {self._tokens} tokens; a step of it takes {model.step_seconds:.4g} s"
        )
        return OpenDraft(model, self._nbytes, note)

    @property
    def _nbytes(self) -> int:
        return self._weights_nbytes + self._kv_nbytes

    def _too_large(self) -> PlanError:
        return PlanError(
            f"the draft model needs {format_nbytes(self._weights_nbytes)} of hbm for all of its weights and "
            f"{format_nbytes(self._kv_nbytes)} for a cache, beside what the model needs that it drafts for, and the "
            f"budget has {format_nbytes(self._settings.budget.hbm)}: raise Budget.hbm to more than {self._nbytes} "
            "bytes, choose a smaller draft model, or leave it out",
            needed=self._nbytes + 1,
        )


def beside(error: PlanError, draft: OpenDraft | None) -> PlanError:
    """``error`` of the model that ``draft`` drafts for, counting in what that takes."""
    if draft is None:
        return error
    needed = error.needed + draft.nbytes
    return PlanError(
        f"beside the draft model's {format_nbytes(draft.nbytes)} of hbm: {error}; with it, {needed} bytes",
        needed=needed,
    )


def _model_of(session: Session, texts: int, tokens: int) -> Model:
    from tierstore.hf.batch.alone import SequenceModel
    from tierstore.hf.batch.dense import DenseModel, why_not_dense

    if not why_not_dense(session.module):
        return DenseModel(session.module, sequences=texts, tokens=tokens)
    model = SequenceModel(session.module, session.together, tokens=tokens)
    if not model.speculates:
        raise ModuleError(
            f"{type(session.module).__name__} cannot draft: what it keeps of a text cannot be taken back; choose "
            "another draft model, or leave it out"
        )
    return model
