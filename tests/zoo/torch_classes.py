"""Every class of torch.nn that has weights, alone and in small stacks."""

# To torch's types an attribute of a module is a Tensor or a Module; what is written here is what people write.
# mypy: disable-error-code="arg-type, assignment, attr-defined, call-overload, has-type, index, misc, no-any-return"
# mypy: disable-error-code="no-untyped-call, operator, override, union-attr"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.registry import add, both, entry, floats, ints, randn


def _stack(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def _norm(norm: Callable[[], nn.Module], conv: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = nn.Sequential(conv(), norm(), conv(), norm())
        for tensor in module.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
        return module

    return build


add(
    "Linear",
    _stack(lambda: nn.Linear(32, 48), nn.ReLU, lambda: nn.Linear(48, 24), lambda: nn.Linear(24, 7)),
    floats(3, 32),
)
add("Linear without bias", _stack(*[lambda: nn.Linear(40, 40, bias=False)] * 6), floats(2, 5, 40))
add(
    "Linear bfloat16",
    lambda: nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)]).bfloat16(),
    floats(2, 64, dtype=torch.bfloat16),
)
add(
    "Linear float64",
    lambda: nn.Sequential(*[nn.Linear(33, 33) for _ in range(5)]).double(),
    floats(2, 33, dtype=torch.float64),
)
add(
    "Linear float16",
    lambda: nn.Sequential(*[nn.Linear(31, 31) for _ in range(5)]).half(),
    floats(2, 31, dtype=torch.float16),
)
add(
    "Linear complex",
    lambda: nn.Sequential(*[nn.Linear(16, 16, dtype=torch.complex64) for _ in range(4)]),
    floats(2, 16, dtype=torch.complex64),
)
add("one Linear", lambda: nn.Linear(64, 64), floats(2, 64))
add("Bilinear", lambda: nn.Bilinear(12, 10, 8), both(randn(3, 12), randn(3, 10)))
add("Conv1d", _stack(*[lambda: nn.Conv1d(8, 8, 3, padding=1)] * 4), floats(2, 8, 10))
add("Conv2d", _stack(*[lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2)] * 4), floats(2, 8, 6, 6))
add("Conv2d reflect", _stack(*[lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")] * 3), floats(2, 8, 6, 6))
add("Conv3d", _stack(*[lambda: nn.Conv3d(4, 4, 3, padding="same")] * 4), floats(1, 4, 4, 4, 4))
add("ConvTranspose1d", _stack(*[lambda: nn.ConvTranspose1d(8, 8, 3)] * 4), floats(2, 8, 10))
add("ConvTranspose2d", _stack(*[lambda: nn.ConvTranspose2d(8, 8, 3)] * 4), floats(2, 8, 5, 5))
add("ConvTranspose3d", _stack(*[lambda: nn.ConvTranspose3d(4, 4, 2)] * 4), floats(1, 4, 3, 3, 3))
add(
    "Conv2d channels_last",
    lambda: nn.Sequential(*[nn.Conv2d(8, 8, 3) for _ in range(4)]).to(memory_format=torch.channels_last),
    floats(2, 8, 12, 12),
)
add("Embedding", _stack(lambda: nn.Embedding(100, 16, padding_idx=0), lambda: nn.Linear(16, 16)), ints(100, 3, 4))
add(
    "Embedding max_norm",
    _stack(lambda: nn.Embedding(100, 16, max_norm=0.5), lambda: nn.Linear(16, 16)),
    ints(100, 3, 4),
)
add(
    "Embedding large",
    _stack(lambda: nn.Embedding(9000, 32), lambda: nn.Linear(32, 64), lambda: nn.Linear(64, 9000)),
    ints(9000, 2, 4),
)
add(
    "Embedding large max_norm",
    _stack(lambda: nn.Embedding(9000, 32, max_norm=1.0), lambda: nn.Linear(32, 64)),
    ints(9000, 2, 4),
)
add(
    "Embedding large sparse",
    _stack(lambda: nn.Embedding(9000, 32, sparse=True), lambda: nn.Linear(32, 64)),
    ints(9000, 2, 4),
    grads=False,
)
add(
    "Embedding scaled by frequency",
    _stack(lambda: nn.Embedding(50, 16, scale_grad_by_freq=True), lambda: nn.Linear(16, 16)),
    ints(50, 3, 4),
)
add("EmbeddingBag", lambda: nn.Sequential(nn.EmbeddingBag(100, 16, mode="mean"), nn.Linear(16, 16)), ints(100, 3, 4))
add("EmbeddingBag max", lambda: nn.Sequential(nn.EmbeddingBag(100, 16, mode="max"), nn.Linear(16, 16)), ints(100, 3, 4))
add(
    "EmbeddingBag max_norm",
    lambda: nn.Sequential(nn.EmbeddingBag(100, 16, max_norm=0.4), nn.Linear(16, 16)),
    ints(100, 3, 4),
)

for _cls in (nn.RNN, nn.LSTM, nn.GRU):
    add(_cls.__name__, lambda c=_cls: c(12, 16), floats(5, 2, 12))
    add(
        f"{_cls.__name__} bidirectional",
        lambda c=_cls: c(12, 16, num_layers=2, bidirectional=True, batch_first=True),
        floats(2, 5, 12),
    )
    add(f"{_cls.__name__} dropout", lambda c=_cls: c(12, 16, num_layers=3, dropout=0.3, bias=False), floats(5, 2, 12))
add("LSTM proj_size", lambda: nn.LSTM(12, 16, num_layers=2, proj_size=8), floats(5, 2, 12))
add("RNN relu", lambda: nn.RNN(12, 16, nonlinearity="relu"), floats(5, 2, 12))
add("LSTM bfloat16", lambda: nn.LSTM(12, 16, num_layers=2).bfloat16(), floats(5, 2, 12, dtype=torch.bfloat16))
add("RNNCell", lambda: nn.RNNCell(12, 16), floats(3, 12))
add("LSTMCell", lambda: nn.LSTMCell(12, 16), floats(3, 12))
add("GRUCell", lambda: nn.GRUCell(12, 16), floats(3, 12))


@entry(floats(3, 6, 12))
class PackedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        lengths = torch.arange(len(x), 0, -1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out, (h, c) = self.lstm(packed)
        return self.head(nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0]), h, c


class _Attending(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **how)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attention(q, k, v)


def _same(*shape: int) -> Callable[[], list[tuple[Any, ...]]]:
    def make() -> list[tuple[Any, ...]]:
        x = torch.randn(*shape)
        y = torch.randn(shape[0], shape[1] + 1, *shape[2:])
        return [(x, x, x), (y, y, y)]

    return make


add("MultiheadAttention", _Attending, both(randn(5, 2, 16), randn(4, 2, 16), randn(4, 2, 16)))
add("MultiheadAttention fast", lambda: _Attending(batch_first=True), _same(2, 5, 16))
add(
    "MultiheadAttention kdim",
    lambda: _Attending(kdim=10, vdim=6),
    both(randn(5, 2, 16), randn(4, 2, 10), randn(4, 2, 6)),
)
add(
    "MultiheadAttention bias",
    lambda: _Attending(add_bias_kv=True, add_zero_attn=True, dropout=0.2),
    both(randn(5, 2, 16), randn(4, 2, 16), randn(4, 2, 16)),
)


def _layer(**how: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **how)


add("TransformerEncoderLayer", _layer, floats(2, 5, 16))
add("TransformerEncoderLayer first", lambda: _layer(norm_first=True, activation="gelu"), floats(2, 5, 16))
add("TransformerEncoder", lambda: nn.TransformerEncoder(_layer(), 3), floats(2, 5, 16))
add(
    "TransformerEncoder norm",
    lambda: nn.TransformerEncoder(_layer(dropout=0.0), 3, nn.LayerNorm(16), enable_nested_tensor=False),
    floats(2, 5, 16),
)
add(
    "TransformerDecoder",
    lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32), 2),
    both(randn(5, 2, 16), randn(4, 2, 16)),
)
add("Transformer", lambda: nn.Transformer(16, 4, 2, 2, 32, batch_first=True), both(randn(2, 5, 16), randn(2, 4, 16)))


@entry(floats(3, 5, 16))
class PaddedEncoder(nn.Module):
    """The fast path with nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(_layer(), 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(5)[None] >= (5 - torch.arange(len(x))[:, None] % 3)
        return self.encoder(x, src_key_padding_mask=padding)


add("LayerNorm", _norm(lambda: nn.LayerNorm(32), lambda: nn.Linear(32, 32)), floats(3, 32))
add("RMSNorm", _norm(lambda: nn.RMSNorm(32), lambda: nn.Linear(32, 32)), floats(3, 32))
add("GroupNorm", _norm(lambda: nn.GroupNorm(2, 8), lambda: nn.Conv1d(8, 8, 3)), floats(3, 8, 12))
add("BatchNorm1d", _norm(lambda: nn.BatchNorm1d(32), lambda: nn.Linear(32, 32)), floats(4, 32))
add(
    "BatchNorm1d momentum None",
    _norm(lambda: nn.BatchNorm1d(32, momentum=None), lambda: nn.Linear(32, 32)),
    floats(4, 32),
)
add(
    "BatchNorm1d without statistics",
    _norm(lambda: nn.BatchNorm1d(32, track_running_stats=False), lambda: nn.Linear(32, 32)),
    floats(4, 32),
)
add("BatchNorm1d wide", lambda: nn.Sequential(*[nn.BatchNorm1d(256) for _ in range(6)]), floats(4, 256))
add("BatchNorm2d", _norm(lambda: nn.BatchNorm2d(8), lambda: nn.Conv2d(8, 8, 1)), floats(3, 8, 4, 4))
add("BatchNorm3d", _norm(lambda: nn.BatchNorm3d(4), lambda: nn.Conv3d(4, 4, 1)), floats(3, 4, 3, 3, 3))
add(
    "BatchNorm2d bfloat16",
    lambda: nn.Sequential(*[nn.BatchNorm2d(64) for _ in range(4)]).bfloat16(),
    floats(3, 64, 2, 2, dtype=torch.bfloat16),
)
add(
    "InstanceNorm1d",
    _norm(lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True), lambda: nn.Conv1d(8, 8, 1)),
    floats(3, 8, 6),
)
add(
    "InstanceNorm2d wide",
    lambda: nn.Sequential(*[nn.InstanceNorm2d(128, affine=True, track_running_stats=True) for _ in range(4)]),
    floats(3, 128, 3, 3),
)
add("PReLU", lambda: nn.Sequential(nn.Linear(16, 64), nn.PReLU(), nn.Linear(64, 64), nn.PReLU(64)), floats(3, 16))


@entry(both(randn(12, 16), lambda: torch.randint(0, 60, (12,))))
class AdaptiveSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(16, 60, [10, 30], div_value=2.0)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        out, loss = self.softmax(self.inner(x), y)
        return out, loss, self.softmax.log_prob(self.inner(x))


@entry(floats(3, 16))
class Lists(nn.Module):
    """ParameterList and ParameterDict, indexed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(16, 16)) for _ in range(5)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(16, 16)), "b": nn.Parameter(torch.randn(16))})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x @ weight
        return x @ self.named["a"] + self.named["b"]


def _multilayer() -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 48), nn.Dropout(0.5), nn.GELU(), nn.Linear(48, 48), nn.Dropout1d(0.2), nn.Linear(48, 3)
    )


add("dropout", _multilayer, floats(4, 24))
add("empty", nn.Identity, floats(2, 3), grads=False)
