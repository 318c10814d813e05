"""How much a job has to do, judged by its first rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from tierstore.batch_plan import BatchJob
from tierstore.batch_schedule import page_keys
from tierstore.errors import RowError
from tierstore.jobs.encoding import Encoder
from tierstore.jobs.rows import BadRow, Row
from tierstore.sampling import Sampling

LOOKED_AT = 256
"""Rows that are made tokens before the job begins."""
UNKNOWN_SEQUENCES, UNKNOWN_PROMPT_TOKENS = 256, 256
"""What is counted on where nobody knows."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``sequences`` are to be generated in all; ``rows`` are the first of them."""

    rows: Sequence[Row]
    sequences: int
    defaults: Sampling

    @classmethod
    def of(cls, rows: Iterable[Row | BadRow], sequences: int, defaults: Sampling) -> Workload:
        """Of a job whose ``rows`` can be read; few of them are."""
        good = (row for row in rows if isinstance(row, Row))
        return cls(tuple(islice(good, LOOKED_AT)), max(sequences, 1), defaults)

    @classmethod
    def unknown(cls, defaults: Sampling) -> Workload:
        """Of rows that will come."""
        return cls((), UNKNOWN_SEQUENCES, defaults)

    def measure(self, encoder: Encoder, page_tokens: int, positions: int | None) -> tuple[BatchJob, int]:
        """For the plan of a batch; and the length of the longest sequence of its rows, prompt and text.

        Rows that are no tokens, or more than ``positions``, do not count: they will fail."""
        seen: set[bytes] = set()
        prompts, new, longest = 0.0, 0, 1
        counted, most_new = 0, 1
        for row in self.rows:
            try:
                tokens = encoder.tokens(row.prompt, row.messages)
            except RowError:
                continue
            samples, most = row.sampling.n, row.sampling.max_new_tokens
            if positions is not None and len(tokens) + most > positions:
                continue
            keys = page_keys(tokens, page_tokens)
            found = sum(key in seen for key in keys) * page_tokens
            seen.update(keys)
            prompts += len(tokens) - found
            new += most * samples
            counted += samples
            most_new = max(most_new, most)
            longest = max(longest, len(tokens) + most)
        if not counted:
            most = self.defaults.max_new_tokens
            job = BatchJob(self.sequences, UNKNOWN_PROMPT_TOKENS, most, most)
            return job, UNKNOWN_PROMPT_TOKENS + most
        return BatchJob(self.sequences, max(prompts / counted, 1.0), new / counted, most_new), longest
