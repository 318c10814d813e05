"""What a job computes with: the model, its budget, and everything that the texts depend on."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from tierstore.budget import Budget
from tierstore.errors import BudgetError
from tierstore.sampling import Sampling

MOST_TOKENS = 1 << 16
"""Of a micro-batch: more make no product faster, and each takes memory beside the budget."""
SPECULATE = ("auto", "lookup", "off")


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """``model`` is a checkpoint as ``tierstore.load`` takes it, and ``device``, ``dtype``, ``kv_format``, ``store`` and
    ``trust_remote_code`` are its arguments.

    Of a ``budget`` without ``kv_hbm``, a part of ``hbm`` and of ``ram`` goes to the KV cache, as is best for the job.
    ``defaults`` are the settings of rows that have none of their own, ``seed`` is the one that rows without a seed
    derive theirs from. ``chat`` takes each plain prompt as what a user says, through the tokenizer's chat template.

    ``sequences`` bounds how many texts are generated at once, ``tokens`` is how many tokens a micro-batch has, at most
    ``MOST_TOKENS``: None for what is fastest. ``speculate`` tries tokens that the text itself suggests ("lookup"),
    where that pays ("auto"), or never ("off"); with "auto" ``draft`` may be the checkpoint of a small model that
    suggests them too, which is whole in ``hbm``. Raises ``BudgetError``.
    """

    model: str | os.PathLike[str]
    budget: Budget
    defaults: Sampling = field(default_factory=Sampling)
    seed: int = 0
    chat: bool = False
    device: str | None = None
    dtype: str | None = None
    kv_format: str | None = None
    store: str | os.PathLike[str] | None = None
    trust_remote_code: bool = False
    sequences: int | None = None
    tokens: int | None = None
    speculate: str = "auto"
    draft: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.speculate not in SPECULATE:
            raise BudgetError(f"speculate is {self.speculate!r}: choose one of {', '.join(SPECULATE)}")
        for name, value in (("sequences", self.sequences), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise BudgetError(f"{name} is {value}: give at least 1, or leave it out")
        if self.tokens is not None and self.tokens > MOST_TOKENS:
            raise BudgetError(f"tokens is {self.tokens}: give at most {MOST_TOKENS}, or leave it out")
        if self.draft is not None and self.speculate != "auto":
            raise BudgetError(f"a draft model is given and speculate is {self.speculate!r}: leave one of the two out")
        if self.budget.activations is not None:
            raise BudgetError(
                "a job cuts its passes into micro-batches by itself: leave Budget.activations out, and set tokens to "
                "make them smaller"
            )
