"""The little of Hypothesis that the conformance suites use: laws on seeded examples, where it is not installed.

It shrinks nothing and remembers nothing; what it draws is the same in every run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from random import Random
from types import ModuleType
from typing import Any

EXAMPLES = 50


class Strategy:
    """Draws values."""

    def __init__(self, draw: Callable[[Random], Any]) -> None:
        self.draw = draw


def given(*unnamed: Strategy, **strategies: Strategy) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    def decorate(law: Callable[..., Any]) -> Callable[..., None]:
        def examples(*args: Any, **kwargs: Any) -> None:
            random = Random(law.__qualname__)
            for _ in range(getattr(examples, "count", EXAMPLES)):
                drawn = {name: strategy.draw(random) for name, strategy in strategies.items()}
                law(*args, *(strategy.draw(random) for strategy in unnamed), **kwargs, **drawn)

        examples.__name__ = law.__name__
        return examples

    return decorate


def settings(*, max_examples: int = EXAMPLES, **_: Any) -> Callable[[Any], Any]:
    def decorate(examples: Any) -> Any:
        examples.count = max_examples
        return examples

    return decorate


def _integers(least: int = 0, most: int = 1 << 16) -> Strategy:
    return Strategy(lambda random: random.randint(least, most))


def _sampled_from(values: Sequence[Any]) -> Strategy:
    return Strategy(lambda random: random.choice(list(values)))


def _unknown(name: str) -> Callable[..., Strategy]:
    def make(*_: Any, **__: Any) -> Strategy:
        def draw(random: Random) -> Any:
            raise NotImplementedError(f"hypothesis.strategies.{name} is not in the stand-in: install hypothesis")

        return Strategy(draw)

    return make


strategies: Any = ModuleType("hypothesis.strategies")
strategies.integers = _integers
strategies.sampled_from = _sampled_from
strategies.__getattr__ = _unknown  # decorators of laws that are not run here still want something
sys.modules["hypothesis.strategies"] = strategies
