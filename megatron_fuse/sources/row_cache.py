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

    layers: list["_Layer"]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    def keep(self, order: Sequence[int], padding: int) -> None:
        """Row i is what row order[i] was, without its first `padding` columns. Only rows that change their place are copied."""
        moves = [(place, row) for place, row in enumerate(order) if place != row]
        places, rows = torch.tensor(moves, dtype=torch.long).reshape(-1, 2).T
        for layer in self.layers:
            for memory in layer.memory:
                if moves:
                    memory[places] = memory[rows]
            layer.hold(*(memory[: len(order), :, padding:] for memory in layer.memory), layer.width - padding)

    def join(self, other: "RowCache") -> None:
        """Takes the rows of another one behind its own; the narrower are padded on the left."""
        for layer, joined in zip(self.layers, other.layers, strict=True):
            width = max(layer.width, joined.width)
            pairs = [(layer.keys, joined.keys), (layer.values, joined.values)]
            layer.hold(*(torch.cat([pad(x, (0, 0, width - x.shape[2], 0)) for x in pair]) for pair in pairs), width)


class _Layer(DynamicLayer):
    """Keys and values, and free memory behind them for those to come: a DynamicLayer copies all that it has for every token.

    memory: both, [b, heads, >= w, size of a head]; keys and values are its first w columns.
    """

    def hold(self, keys: torch.Tensor, values: torch.Tensor, width: int) -> None:
        self.memory = keys, values
        self.keys, self.values = keys[:, :, :width], values[:, :, :width]

    @property
    def width(self) -> int:
        return self.keys.shape[2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [b, heads, n, size of a head]; returns all keys and values."""
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.hold(*(states[:, :, :0] for states in new), 0)
        begin, end = self.width, self.width + key_states.shape[2]
        if end > self.memory[0].shape[2]:
            self.memory = tuple(pad(x, (0, 0, 0, end - begin + _FREE)) for x in (self.keys, self.values))
        for memory, states in zip(self.memory, new, strict=True):
            memory[:, :, begin:end] = states
        self.hold(*self.memory, end)
        return self.keys, self.values
