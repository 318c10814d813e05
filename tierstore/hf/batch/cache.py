"""What a model is given as its cache for one micro-batch: it writes to pages and hands out handles for attention."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tierstore.errors import ModuleError
from tierstore.hf.batch.passes import MicroPass
from tierstore.hf.kv.states import LayerStates, PagedStates


class TokenLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What transformers asks of one layer of a ``TokenCache``: of its point of view it is empty."""

    is_compileable = False
    is_croppable = False
    is_initialized = True

    def __init__(self, micro: MicroPass, layer: int, window: int | None) -> None:
        self.keys = self.values = None
        self._micro, self._layer = micro, layer
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._micro.write(self._layer, key_states, value_states)
        states = LayerStates(self._micro, self._layer, _refuse)
        keys, values = (
            PagedStates.of(states, part, each.shape, each.dtype, each.device)
            for part, each in enumerate((key_states, value_states))
        )
        return keys, values

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """As many keys as queries: which are seen, positions say and no mask."""
        return query_length if isinstance(query_length, int) else len(query_length), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its former name


class TokenCache(Cache):
    """The keys and values of the tokens of one micro-batch, whatever sequences they are from."""

    def __init__(self, micro: MicroPass, windows: dict[int, int | None]) -> None:
        """``windows`` of the layers that keep keys and values."""
        super().__init__(layers=[TokenLayer(micro, layer, windows.get(layer)) for layer in range(max(windows) + 1)])

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, that it keeps no recurrent state."""
        return [False] * len(self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the tokens' keys [1, heads, R, key_dim] and values of a layer; returns handles for attention.

        Raises ``ModuleError`` for other shapes or dtypes than the config says."""
        layer: Any = self.layers[layer_idx]
        found: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
        return found


def _refuse(layer: int) -> NoReturn:
    raise ModuleError(
        f"layer {layer} computes with keys and values in a way of its own, but the tokens of a batch are of many "
        f"sequences: generate one sequence at a time"
    )
