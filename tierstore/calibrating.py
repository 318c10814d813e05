"""Packing with a text: what rounding a weight does to the model's outputs on it is made up for by weights beside it.

The text, cut into windows of tokens, goes through the model a layer at a time. A layer is read, run on every window
while ``X^T X`` of the inputs of its linear weights is summed up, packed with error feedback, and run once more with
what it has become: so the next layer gets, and makes up for, what it will get from the packed model.

In memory stand: one layer in the checkpoint's dtype; for each distinct input of it with ``k`` features 4 k² bytes; and
while a weight [n, k] is packed 12 k² + 24 n k bytes more; and the windows' hidden states, for ``w`` windows of ``t``
tokens and ``h`` features ``w t h`` elements of the model's dtype, on the host. Before the first layer and behind the
last one it is what the model has outside its layers instead, its tables first of all.
"""

from __future__ import annotations

import copy
import hashlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tierstore.errors import ModuleError, StoreReadError
from tierstore.formats.feedback import damping_for, pack_with_feedback
from tierstore.formats.format import Format, Parts, matrices_of, pack_matrices, pack_tensor, unpack_tensor
from tierstore.hf.grams import Gram, Grams
from tierstore.hf.layers import Call, DecoderLayers, layers_path
from tierstore.hf.model import listed
from tierstore.hf.source import Source
from tierstore.hf.tokenizer import load_tokenizer

WINDOWS, WINDOW_TOKENS = 128, 512
LEAST_WINDOWS = 8
"""Less text than this says more about itself than about the model."""
MOST_FEATURES_A_TOKEN = 4
"""With fewer tokens for its input features a weight, such as a rare expert's, gains nothing that can be relied on."""
TEXT_NBYTES = 4 << 20
"""How much of a text is looked at."""

Read = Callable[[str], Tensor]


class Calibrator:
    """Packs the weights of a decoder on meta, ``module``, in the order of its layers, as an assembly's packer does.

    ``read`` gives a tensor by the name that ``named_parameters()`` or ``named_buffers()`` has for it; ``windows`` are
    int64 [windows, tokens]; ``forms`` are the formats of what is packed. Weights that no linear product uses, and those
    outside the layers but for heads behind them, are packed as without a text. The same windows always give the same
    parts: a packing that goes on after a kill begins anew with them, and packs what is left as it would have been.

    Raises ``ModuleError`` for a module that is no decoder, and what ``read`` raises.
    """

    def __init__(
        self, module: nn.Module, read: Read, windows: Tensor, forms: Mapping[str, Format], device: torch.device
    ) -> None:
        self._module, self._read, self._windows, self._forms, self._device = module, read, windows, forms, device
        self._names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        self._path = layers_path(module)
        self._layers = tuple(cast(nn.ModuleList, module.get_submodule(self._path)))
        self._layer_of: dict[str, int] = {}
        for number, layer in enumerate(self._layers):
            for parameter in layer.parameters():
                self._layer_of.setdefault(self._names[id(parameter)], number)
        self._heads = self._find_heads()
        self._done = 0
        self._parts: dict[str, Parts] = {}
        self._untaught: dict[str, list[str]] = {}
        self._stopped = False
        self._hidden, self._calls = self._begin()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was packed as without a text, and why."""
        return tuple(f"packed as without a text, {why}: {listed(names)}" for why, names in self._untaught.items())

    def __call__(self, name: str, form: Format, tensor: Tensor) -> Parts:
        """The parts of ``tensor``, which is weight ``name``. Weights are asked for once each, in the module's order."""
        with torch.no_grad():
            if name in self._heads:
                self._go_to(len(self._layers))
                return self._packed(name, form, tensor, self._head_gram(name))
            if name in self._layer_of:
                self._go_to(self._layer_of[name] + 1)
                return self._parts.pop(name)
            return pack_tensor(form, tensor)

    def stop(self) -> None:
        """Have a call that another thread is in end soon, by an exception."""
        self._stopped = True

    def _find_heads(self) -> dict[str, str]:
        """Paths, by their weights' names, of linear modules behind the layers with a weight of their own."""
        heads: dict[str, str] = {}
        behind = False
        for path, module in self._module.named_modules():
            behind = behind or path == self._path
            if isinstance(module, nn.Linear):
                name = self._names[id(module.weight)]
                if behind and name == f"{path}.weight" and name not in self._layer_of and name in self._forms:
                    heads[name] = path
        return heads

    def _begin(self) -> tuple[Tensor, tuple[Call, ...]]:
        """What enters the first layer, [windows, tokens, features] on the host, and how each layer is called."""
        layers = self._stand_ins()
        hidden = torch.empty(0)
        calls: tuple[Call, ...] = ()
        with torch.no_grad():
            for number, window in enumerate(self._windows):
                entering, called = layers.begin(window[None].to(self._device))
                calls = calls or called
                if not all(map(Call.is_like, calls, called)):
                    raise ModuleError(
                        f"{type(self._module).__name__} cannot be calibrated: its layers are given more of a text than "
                        "hidden states: pack it without calibration"
                    )
                if number == 0:
                    hidden = torch.empty((len(self._windows), *entering.shape[1:]), dtype=entering.dtype)
                hidden[number] = entering[0]
        return hidden, calls

    def _go_to(self, count: int) -> None:
        """Pack layers until ``count`` are."""
        while self._done < count:
            self._next_layer()

    def _next_layer(self) -> None:
        original = self._layers[self._done]
        layer = self._present(original, (*original.parameters(), *original.buffers()))
        _take_experts_one_by_one(layer)
        names = [self._names[id(parameter)] for parameter in original.parameters()]
        here = {name: tensor for name, tensor in zip(names, layer.parameters(), strict=True) if self._is_packed(name)}
        with Grams(here) as grams:
            for _ in self._outputs(layer):
                pass
        self._parts = {}
        for name, weight in here.items():
            self._check_wanted()
            form = self._forms[name]
            self._parts[name] = parts = self._packed(name, form, weight, grams.of(name))
            weight.copy_(unpack_tensor(form, parts, weight.shape, weight.dtype))
        del grams
        for number, made in enumerate(self._outputs(layer)):
            self._hidden[number] = made[0]
        self._done += 1

    def _check_wanted(self) -> None:
        if self._stopped:
            raise InterruptedError("calibration was stopped")

    def _is_packed(self, name: str) -> bool:
        return name in self._forms and self._layer_of[name] == self._done

    def _outputs(self, layer: nn.Module) -> Iterator[Tensor]:
        call = self._calls[self._done]
        for window in self._hidden:
            self._check_wanted()
            yield call.run(layer, window[None].to(self._device))

    def _head_gram(self, name: str) -> Mapping[int, Gram]:
        """The Gram of the inputs of a head; none where it has no part in the forward."""
        layers = self._stand_ins()
        gram = None
        for tokens, hidden in zip(self._windows, self._hidden, strict=True):
            inputs = layers.finish(tokens[None].to(self._device), hidden[None].to(self._device), self._heads[name])
            if inputs is not None:
                gram = gram or Gram(inputs.shape[-1], self._device)
                gram.add(inputs)
        return {0: gram} if gram is not None else {}

    def _packed(self, name: str, form: Format, weight: Tensor, grams: Mapping[int, Gram]) -> Parts:
        """The parts of a stack of matrices, each by the Gram of its number."""
        front, _, k = matrices_of(weight.shape)
        taught = {number: gram for number, gram in grams.items() if gram.tokens * MOST_FEATURES_A_TOKEN >= k}

        def pack(number: int, matrix: Tensor) -> dict[str, Tensor]:
            if (gram := taught.get(number)) is None:
                return form.pack(matrix)
            return pack_with_feedback(form, matrix, gram.matrix, damping_for(gram.tokens, k))

        if len(taught) < (count := prod(front)):
            why = "as hardly any tokens reached them" if grams else "as no product x @ w.T uses them"
            some = f" ({count - len(taught)} of {count})" if front else ""
            self._untaught.setdefault(why, []).append(name + some)
        return pack_matrices(form, weight, pack)

    def _stand_ins(self) -> DecoderLayers:
        """The model, wholly there but for its layers and heads."""
        absent = {id(tensor) for layer in self._layers for tensor in (*layer.parameters(), *layer.buffers())}
        absent |= {id(self._module.get_submodule(path).weight) for path in self._heads.values()}
        tensors = (*self._module.parameters(), *self._module.buffers())
        model = self._present(self._module, [tensor for tensor in tensors if id(tensor) not in absent])
        return DecoderLayers(model, self._path)

    def _present(self, module: nn.Module, tensors: Iterable[Tensor]) -> nn.Module:
        """A copy of ``module`` in which ``tensors`` have their values, on the device."""
        values: dict[int, Tensor] = {}
        for tensor in tensors:
            value = self._read(self._names[id(tensor)]).to(self._device)
            values[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
        return copy.deepcopy(module, cast(dict[int, Any], values))


def read_windows(path: Path, source: Source, trust_remote_code: bool = False) -> Tensor:
    """The text in file ``path`` as windows of tokens for the model of ``source``, int64 [windows, tokens].

    At most ``WINDOWS`` of ``WINDOW_TOKENS`` each, or as many tokens as the model has positions, spread evenly over the
    first ``TEXT_NBYTES`` of the text. Where the tokenizer puts a token before a text, every window begins with it.
    Raises ``StoreReadError`` for a file that cannot be read or is no UTF-8, ``CheckpointError`` for a checkpoint
    without tokenizer, and ``ModuleError`` for a text of less than ``LEAST_WINDOWS`` windows.
    """
    tokenizer = load_tokenizer(source.path, trust_remote_code)
    positions = getattr(cast(Any, source.module).config, "max_position_embeddings", None)
    length = min(WINDOW_TOKENS, positions or WINDOW_TOKENS)
    try:
        with path.open("rb") as file:
            head = file.read(TEXT_NBYTES)
        text = getincrementaldecoder("utf-8")().decode(head, final=len(head) < TEXT_NBYTES)
    except OSError as error:
        raise StoreReadError(f"{str(path)!r} cannot be read: {error.strerror}: give a text file") from error
    except UnicodeDecodeError as error:
        raise StoreReadError(f"{str(path)!r} is no UTF-8 text ({error.reason}): give a text file") from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer("")["input_ids"][:1]
    before = first if first == [tokenizer.bos_token_id] else []
    step = length - len(before)
    there = len(tokens) // step
    if there < LEAST_WINDOWS:
        raise ModuleError(
            f"{str(path)!r} has {len(tokens)} tokens, calibration needs {LEAST_WINDOWS * step} at least and uses up to "
            f"{WINDOWS * step}: give a longer text"
        )
    count = min(there, WINDOWS)
    starts = [number * there // count * step for number in range(count)]
    return torch.tensor([[*before, *tokens[start : start + step]] for start in starts])


def fingerprint(windows: Tensor) -> str:
    """What tells windows from others."""
    return hashlib.sha256(f"{tuple(windows.shape)} {windows.tolist()}".encode()).hexdigest()


def _take_experts_one_by_one(layer: nn.Module) -> None:
    """Have experts multiply with their own matrices, as they are seen by Grams, and not all in one product."""
    for module in layer.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
