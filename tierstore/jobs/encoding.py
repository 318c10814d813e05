"""From a row's prompt or messages to tokens, and whether a model can take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tierstore.errors import RowError


@dataclass(frozen=True, slots=True)
class Encoder:
    """``tokenizer`` is one of transformers; a messages' row goes through its chat template.

    ``chat`` takes each plain prompt as what a user says, through the template too; otherwise its text is taken as it
    is. ``vocabulary`` counts the tokens that the model has embeddings of. ``special`` are the tokens that no decoded
    text has, by how they are written.
    """

    tokenizer: Any
    vocabulary: int
    chat: bool
    special: Mapping[str, int] = field(default_factory=dict)

    def tokens(self, prompt: str | None, messages: Sequence[Mapping[str, Any]] | None) -> tuple[int, ...]:
        """The tokens of one of the two. Raises ``RowError`` for what cannot be made tokens of this model."""
        if messages is None and self.chat:
            messages = [{"role": "user", "content": prompt}]
        ids = self._plain(prompt or "") if messages is None else self._templated(messages)
        if not ids:
            raise RowError("the prompt has no tokens: write some text")
        if max(ids) >= self.vocabulary:
            raise RowError(
                f"the prompt has token {max(ids)}, and the model knows {self.vocabulary} of them: the tokenizer beside "
                "the checkpoint is another model's"
            )
        return ids

    def stops(self, stop: Sequence[str]) -> tuple[tuple[str, ...], frozenset[int]]:
        """Those of the strings ``stop`` that are text, and the special tokens that the others are.

        Raises ``RowError`` for a special token with text beside it, which is found in no text."""
        text = tuple(each for each in stop if each not in self.special)
        for each in text:
            for special in self.special:
                if special in each:
                    raise RowError(
                        f"stop has {each!r:.100}, and texts do not show the special token {special!r} in it: write "
                        "the token alone, or the text alone"
                    )
        return text, frozenset(self.special[each] for each in stop if each in self.special)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _plain(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(prompt)["input_ids"])

    def _templated(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise RowError("the row has messages and the tokenizer no chat template: give a prompt instead")
        try:
            encoded = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in messages], add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template is a program, which refuses what it does not know in its own ways
            raise RowError(f"the chat template cannot render these messages ({error})") from error
        return tuple(encoded["input_ids"])


def special_tokens(tokenizer: Any) -> Mapping[str, int]:
    """The tokens that ``Encoder.decode`` leaves out, by how they are written."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: number for number, token in added.items() if token.special}


def end_tokens(module: Any, tokenizer: Any) -> Collection[int]:
    """The tokens after which ``module`` ends a text: those of its generation config, else the tokenizer's."""
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends]))
