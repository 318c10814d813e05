"""A tokenizer of made-up words, for checkpoints with random weights, and prompts of such words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"


def make_words(folder: Path, vocab: int) -> None:
    """A tokenizer of ``vocab`` words, each a token, beside the weights in ``folder``."""
    words = {END: 0} | {f"w{number}": number for number in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    cast(Any, PreTrainedTokenizerFast)(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def prompt_of_words(number: int, tokens: int, vocab: int) -> str:
    """Prompt ``number``, of so many tokens: always the same."""
    chosen = random.Random(number)
    return " ".join(f"w{chosen.randrange(1, vocab)}" for _ in range(tokens))
