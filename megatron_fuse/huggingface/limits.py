"""The number of positions and of token ids of a model, from its config."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_fuse.model.config_file import read_model_config

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # keys of a config


def max_positions(config: Any) -> int | None:
    """Most tokens that a model can read, from its Hugging Face config; None if the config states no limit."""
    config = config.get_text_config()
    return _positive(getattr(config, name, None) for name in _POSITIONS)


def longest_text(model: Any) -> int | None:
    """Most tokens that a loaded model can read; None if its config states no limit.

    RoBERTa and similar models count positions from the padding token's id + 1, and so can read that many
    tokens fewer.
    """
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    first = max(
        (table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None),
        default=0,
    )
    limit = max_positions(model.config)
    return limit and limit - first


def declared_positions(model_dir: Path) -> int | None:
    """Most tokens that a model can read, from its config.json; None if it states no limit.

    Also for models that transformers does not know. Raises UserError if the config cannot be read.
    """
    config = read_model_config(model_dir)
    return _positive(getattr(config, name) for name in _POSITIONS)


def declared_vocab_size(model_dir: Path) -> int | None:
    """Number of token ids of a model, from its config.json; None if it does not state it."""
    return _positive([read_model_config(model_dir).vocab_size])


def _positive(values: Iterable[Any]) -> int | None:
    """The first value that is a positive integer; None if no value is."""
    return next((value for value in values if isinstance(value, int) and value > 0), None)
