"""Keys and values of the rows that are generated together, which leave and join them one by one."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_FREE = 32  # positions that a layer takes at a time


def cache_argument(forward: Callable) -> str | None:
    """Under which name a model's forward pass takes its cache: transformers renames it in 5.24. None if it takes none."""
    names = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def keeps_keys_and_values(config: PreTrainedConfig) -> bool:
    """Whether these are all that every layer of a model keeps of a text: no state of a recurrence or a convolution."""
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers)


class RowCache(Cache):
    """Per layer of the model keys and values [b, heads, w, size of a head], every row's last position in column w - 1."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    @property
    def row_layers(self) -> list["_Layer"]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def keep(self, order: Sequence[int], padding: int) -> None:
        """Row i is what row order[i] was, without its first `padding` columns. Only rows that change their place are copied."""
        moves = [(place, row) for place, row in enumerate(order) if place != row]
        places, rows = torch.tensor(moves, dtype=torch.long).reshape(-1, 2).T
        for layer in self.row_layers:
            for memory in layer.memory:
                if moves:
                    memory[places] = memory[rows]
            keys, values = (memory[: len(order), :, padding:] for memory in layer.memory)
            layer.hold(keys, values, layer.width - padding)

    def join(self, other: "RowCache") -> None:
        """Takes the rows of another one behind its own; the narrower are padded on the left."""
        for layer, joined in zip(self.row_layers, other.row_layers, strict=True):
            width = max(layer.width, joined.width)
            pairs = zip(layer.held(), joined.held(), strict=True)
            keys, values = (torch.cat([pad(x, (0, 0, width - x.shape[2], 0)) for x in pair]) for pair in pairs)
            layer.hold(keys, values, width)


class _Layer(DynamicLayer):
    """Keys and values, and free memory behind them for those to come: a DynamicLayer copies all that it has for every token.

    memory: both, [b, heads, >= w, size of a head]; keys and values are its first w columns.
    """

    def hold(self, keys: torch.Tensor, values: torch.Tensor, width: int) -> None:
        self.memory, self.width = (keys, values), width
        self.keys, self.values = self.held()

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [b, heads, w, size of a head]."""
        keys, values = self.memory
        return keys[:, :, : self.width], values[:, :, : self.width]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [b, heads, n, size of a head]; returns all keys and values."""
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
