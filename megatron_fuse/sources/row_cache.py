"""The keys and values of rows that are generated together. Rows can leave and join one by one."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_FREE = 32  # free positions that a layer adds each time it grows


def cache_argument(forward: Callable) -> str | None:
    """The name of the cache among the arguments of a model's forward pass; None if it takes no cache.

    transformers 5.24 renames it.
    """
    names = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def keeps_keys_and_values(config: PreTrainedConfig) -> bool:
    """Whether every layer of a model keeps only keys and values: no state of a recurrence or convolution."""
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers)


class RowCache(Cache):
    """Per layer of the model, keys and values [b, heads, w, head size].

    Column w - 1 is every row's last position.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    @property
    def row_layers(self) -> list["_Layer"]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def keep(self, order: Sequence[int], padding: int) -> None:
        """Row i becomes the old row order[i], without its first `padding` columns.

        Only rows that change their place are copied.
        """
        moves = [(new, old) for new, old in enumerate(order) if new != old]
        new_rows, old_rows = torch.tensor(moves, dtype=torch.long).reshape(-1, 2).T
        for layer in self.row_layers:
            for memory in layer.memory:
                if moves:
                    memory[new_rows] = memory[old_rows]
            keys, values = (memory[: len(order), :, padding:] for memory in layer.memory)
            layer.hold(keys, values, layer.width - padding)

    def join(self, other: "RowCache") -> None:
        """Appends the rows of another cache. The narrower rows are padded on the left."""
        for layer, joined in zip(self.row_layers, other.row_layers, strict=True):
            width = max(layer.width, joined.width)
            pairs = zip(layer.held(), joined.held(), strict=True)
            keys, values = (
                torch.cat([pad(x, (0, 0, width - x.shape[2], 0)) for x in pair]) for pair in pairs
            )
            layer.hold(keys, values, width)


class _Layer(DynamicLayer):
    """Keys and values with free memory after them for later tokens.

    A DynamicLayer without free memory would copy all of its content for every token.
    memory: keys and values, each [b, heads, >= w, head size]; only the first w columns are filled.
    """

    def hold(self, keys: torch.Tensor, values: torch.Tensor, width: int) -> None:
        self.memory, self.width = (keys, values), width
        self.keys, self.values = self.held()

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [b, heads, w, head size]."""
        keys, values = self.memory
        return keys[:, :, : self.width], values[:, :, : self.width]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values, each [b, heads, n, head size], and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(key_states[:, :, :0], value_states[:, :, :0], 0)
        begin, end = self.width, self.width + key_states.shape[2]
        if end > self.memory[0].shape[2]:
            keys, values = (pad(x, (0, 0, 0, end - begin + _FREE)) for x in self.held())
        else:
            keys, values = self.memory
        keys[:, :, begin:end], values[:, :, begin:end] = key_states, value_states
        self.hold(keys, values, end)
        return self.held()
