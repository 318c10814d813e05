"""The tokenizer that lies beside a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tierstore.errors import CheckpointError


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``; nothing is fetched. Raises ``CheckpointError`` where there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load ({error}): put its tokenizer files there"
        ) from error
    return tokenizer
