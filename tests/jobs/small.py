"""A job for the tiny checkpoint: its rows, its settings, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.jobs.made import write_rows
from tierstore.budget import Budget
from tierstore.jobs.settings import JobSettings
from tierstore.sampling import Sampling

SYSTEM = "You are a helper, who says what is asked and no more than that, in a few words."
ROWS: list[Any] = [
    *({"id": f"plain {n}", "prompt": f"{SYSTEM} Say {n}.", "max_new_tokens": 1 + 2 * n} for n in range(3)),
    {"id": "chat", "messages": [{"role": "user", "content": "Why is the sky blue?"}]},
    {"id": "many", "prompt": f"{SYSTEM} Tell me more.", "n": 3, "temperature": 1.5, "seed": 7},
    {"id": "cold", "prompt": "abc", "temperature": 0.8, "top_p": 0.9},
    {"id": "bad", "prompt": "abc", "top_p": 9},
    {"id": "long", "prompt": "x" * 3000},
    {
        "custom_id": "request",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "n": 2, "temperature": 1.0},
    },
]
TEXTS = 3 + 1 + 3 + 1 + 2
FAILED = 2


def write_prompts(folder: Path) -> Path:
    return write_rows(folder / "prompts.jsonl", ROWS)


def settings_of(checkpoint: Path, **change: Any) -> JobSettings:
    """Micro-batches of a fixed size, so that two jobs compute the same bits; most weights stream."""
    given: dict[str, Any] = {
        "budget": Budget(hbm="6MiB", kv_hbm="5MiB"),
        "defaults": Sampling(max_new_tokens=6),
        "tokens": 32,
    }
    return JobSettings(model=checkpoint, **given | change)


def texts_of(results: Path) -> dict[tuple[Any, int], tuple[str, int]]:
    """Text and seed of each sample. Fails where one is there twice."""
    found: dict[tuple[Any, int], tuple[str, int]] = {}
    for line in results.read_text().splitlines():
        table = json.loads(line)
        if "custom_id" in table:
            body = table["response"]["body"]
            said = {(table["custom_id"], c["index"]): (c["message"]["content"], body["seed"]) for c in body["choices"]}
        else:
            said = {(table["id"], table.get("index", 0)): (table["text"], table["seed"])}
        assert not said.keys() & found.keys()
        found |= said
    return found
