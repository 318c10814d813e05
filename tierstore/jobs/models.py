"""What a job computes with: tokens of all texts side by side where the model can, or each text by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from tierstore.batch_plan import CPU_TOKENS, CUDA_TOKENS, BatchJob, BatchPlan, BatchRoom, KvTier, build_batch_plan
from tierstore.batch_schedule import Limits
from tierstore.budget import Budget, format_nbytes
from tierstore.drafting import PassCost
from tierstore.errors import ModuleError
from tierstore.extents import align_up
from tierstore.jobs.engine import Model
from tierstore.jobs.hidden_states import HiddenStates, StatesRoom
from tierstore.jobs.probing import probe
from tierstore.page_needs import advice
from tierstore.plan import Links

if TYPE_CHECKING:
    from torch import nn

    from tierstore.hf.batch.slices import Capacity
    from tierstore.hf.kv.memory import KvMemory
    from tierstore.session import Session

PROMPT_TOKENS = 128
"""Tokens of a prompt that go through the model at once, where each text is computed by itself."""
ALONE_PART = 4
"""The caches of such texts take up to one part in so many of hbm: half where the longest needs it."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """``model`` in passes of micro-batches of ``tokens``, within ``limits``; ``cost`` is what a pass takes. Texts
    ``share`` what their prompts begin with. ``exact`` says whether drafted tokens leave every bit of others alone,
    ``why`` how the batch was chosen, in words. ``enough`` says which budget has room for a text of so many tokens, None
    where the session's KV cache knows."""

    model: Model
    tokens: int
    plan: BatchPlan
    limits: Limits
    cost: PassCost
    shares: bool
    exact: bool
    speculates: bool
    why: str
    enough: Callable[[int], str] | None = None


def prepare_side_by_side(
    session: Session,
    job: BatchJob,
    sizes: Sequence[int] | None,
    *,
    vocabulary: int,
    positions: int | None,
    unified: bool,
    states: StatesRoom | None,
    sequences: int | None,
    closing: ExitStack,
) -> Prepared:
    """Tokens of up to ``sequences`` texts side by side, over the pages of the session's KV cache. ``sizes`` of
    micro-batches to choose from are the usual ones for None. ``states`` is the room for hidden states of those that
    wait, None where they stay. The model is closed with ``closing``."""
    from tierstore.hf.batch.tokens import TokenModel

    memory = session.kv.memory
    if sizes is None:
        sizes = _even_sizes(session.module) if memory.device.type == "cpu" else CUDA_TOKENS
    hidden = HiddenStates(session, states)
    model = TokenModel(session.module, memory, hidden.together, tokens=sizes[0])
    closing.callback(model.close)
    costs = probe(model, session, sizes, vocabulary=vocabulary, positions=positions)
    waiting = hidden.measure(model, vocabulary=vocabulary, positions=positions)
    room = model.capacity
    batch_room = BatchRoom(
        room.page_tokens,
        room.open_pages,
        _tiers(memory, room, unified, session.links),
        sequences=sequences,
        waiting=waiting,
        sequence_pages=room.sequence_pages,
    )
    plan = build_batch_plan(costs, job, batch_room)
    hidden.begin(plan.waiting)
    model.tokens = plan.tokens
    compute = costs.compute_seconds[plan.tokens]
    return Prepared(
        model,
        plan.tokens,
        plan,
        _limits(plan.tokens, plan.micro_batches, plan.sequences, room),
        PassCost(plan.tokens, plan.micro_batches, compute, costs.transfer_seconds, costs.overhead_seconds),
        shares=True,
        exact=True,
        speculates=True,
        why=plan.explain(),
    )


def prepare_alone(
    session: Session,
    job: BatchJob,
    tokens: int | None,
    kv_nbytes: int,
    *,
    vocabulary: int,
    positions: int | None,
    states: StatesRoom | None,
    sequences: int | None,
    closing: ExitStack,
) -> Prepared:
    """Up to ``sequences`` texts, each a call of its own, with a cache of its own; ``kv_nbytes`` are for these. A prompt
    goes through the model ``tokens`` at a time. ``states`` is the room for hidden states of calls that wait, None where
    they stay. The model is closed with ``closing``."""
    from tierstore.hf.batch.alone import SequenceModel

    tokens = PROMPT_TOKENS if tokens is None else tokens
    each_text, each_token = _kept_nbytes(session)
    most = max(kv_nbytes // each_token, 1) if each_token else None
    hidden = HiddenStates(session, states)
    model = SequenceModel(session.module, hidden.together, tokens=1, positions=most)
    closing.callback(model.close)
    costs = probe(model, session, (1,), vocabulary=vocabulary, positions=positions)
    model.tokens = tokens
    waiting = hidden.measure(model, vocabulary=vocabulary, positions=positions)
    # a call takes about as long for some tokens as for one, so that calls are what is counted
    calls = BatchJob(job.sequences, max(job.prompt_tokens / tokens, 1), job.new_tokens, job.most_new_tokens)
    room = model.capacity
    fitting = room.pages // ceil((job.prompt_tokens + job.new_tokens) / room.page_tokens)
    fitting = max(min(fitting, kv_nbytes // max(each_text, 1)), 1)
    if waiting is not None:
        passes = calls.prompt_tokens + job.new_tokens
        waiting = waiting.of_calls(tokens, (job.prompt_tokens + job.new_tokens) / passes)
        fitting = min(fitting, waiting.most(1))
    batch_room = BatchRoom(1 << 20, fitting, [KvTier(fitting)], sequences=sequences, waiting=waiting)
    plan = build_batch_plan(costs, calls, batch_room)
    why = f"{plan.sequences} texts at once, each a call of its own: a pass takes about {plan.seconds_per_pass:.4g} s"
    if waiting is not None:
        where = waiting.plan(plan.sequences, 1)
        hidden.begin(where)
        why += f"\n{where.explain()}"
    return Prepared(
        model,
        tokens,
        plan,
        _limits(tokens, plan.sequences, plan.sequences, room),
        PassCost(tokens, plan.sequences, costs.compute_seconds[1], costs.transfer_seconds),
        shares=False,
        exact=False,
        speculates=model.speculates,
        enough=lambda tokens: advice(align_up(tokens, room.page_tokens) * each_token, 1, tokens),
        why=why,
    )


def divide_alone(
    budget: Budget, module: nn.Module, job: BatchJob, longest: int, *, sequences: int, kv_format: str | None
) -> tuple[Budget, int, str]:
    """The budget without a KV cache in pages, the bytes for caches of texts by themselves, and why in words.

    Raises ``ModuleError`` for bytes of other tiers, and for formats, which these caches have not."""
    if budget.kv_ram or budget.kv_nvme or kv_format is not None:
        raise ModuleError(
            f"{type(module).__name__} keeps a cache of its own for each text, on the device and as it is: leave "
            "kv_ram, kv_nvme and kv_format out"
        )
    each = token_nbytes(module)
    kv_nbytes = budget.kv_hbm
    if not kv_nbytes:
        wanted = ceil(sequences * (job.prompt_tokens + job.new_tokens + 256)) * each
        kv_nbytes = min(wanted, max(budget.hbm // ALONE_PART, min((longest + 256) * each, budget.hbm // 2)))
    reason = f"{format_nbytes(kv_nbytes)} of hbm are for the caches of texts, each {format_nbytes(each)} a token"
    hbm = budget.hbm if budget.kv_hbm else budget.hbm - kv_nbytes
    return Budget(hbm, budget.ram, budget.nvme), kv_nbytes, reason


def _even_sizes(module: nn.Module) -> Sequence[int]:
    """The usual ones, or somewhat larger, so that no bit of a row depends on where it stands."""
    from tierstore.hf.batch.even import even_tokens

    threads = torch.get_num_threads()
    return sorted({even_tokens(module, tokens, threads) or tokens for tokens in CPU_TOKENS})


def _kept_nbytes(session: Session) -> tuple[int, int]:
    """Bytes that a cache keeps of a text, however long, and of each token besides: seen by computing some."""
    from tierstore.hf.batch.alone import SequenceModel
    from tierstore.hf.batch.slices import Slice

    model = SequenceModel(session.module, session.together, tokens=1)
    sequence, _ = model.add((0,))
    found = []
    for _ in range(2):
        model.step([Slice(sequence, (0,), 1, False)])
        found.append(model.nbytes)
    model.close()
    each = max(found[1] - found[0], 0)
    return max(found[0] - each, 0), each


def token_nbytes(module: nn.Module) -> int:
    """Bytes that a transformers cache keeps of a token; of layers that keep something else, as if it were keys and
    values of the whole width."""
    from tierstore.hf.kv.shapes import dtype_of, layers_of

    size = dtype_of(module).itemsize
    try:
        return sum(each.heads * (each.key_dim + each.value_dim) for each in layers_of(module)) * size
    except ModuleError:
        config: Any = module.config
        text = config.get_text_config(decoder=True)
        return 2 * int(getattr(text, "num_hidden_layers", 1)) * int(getattr(text, "hidden_size", 1)) * size


def _limits(tokens: int, micro_batches: int, sequences: int, room: Capacity) -> Limits:
    pages = (room.page_tokens, room.pages, room.open_pages, room.sequence_pages)
    return Limits(tokens, micro_batches, sequences, *pages)


def _tiers(memory: KvMemory, room: Capacity, unified: bool, links: Links) -> list[KvTier]:
    """The pages of the kind of layers that has the fewest, and what those that are not read in place take."""
    plans = memory.plan.kinds
    nbytes = sum(plan.kind.page_nbytes for plan in plans)
    hbm, ram, nvme = next(plan.tier_pages for plan in plans if plan.pages == room.pages)
    slow = 0.0 if unified else nbytes / links.ram_bytes_per_second
    return [KvTier(hbm), KvTier(ram, slow), KvTier(nvme, nbytes / links.nvme_bytes_per_second)]
