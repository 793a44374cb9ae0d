"""How many tokens and ids a model takes, by its config."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_fuse.model.config_file import read_model_config

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # keys of a config


def max_positions(config: Any) -> int | None:
    """Most tokens that a model can read, from its Hugging Face config; None where it states no limit."""
    config = config.get_text_config()
    return _positive(getattr(config, name, None) for name in _POSITIONS)


def longest_text(model: Any) -> int | None:
    """Most tokens that a loaded model can read; None where its config states no limit.

    RoBERTa and its kin count positions from beyond the padding token's id, and have as many fewer.
    """
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    first = max(
        (table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), default=0
    )
    limit = max_positions(model.config)
    return limit and limit - first


def declared_positions(model_dir: Path) -> int | None:
    """Most tokens that a model can read, as its config.json says; else None. For models that transformers need not know."""
    config = read_model_config(model_dir)
    return _positive(getattr(config, name) for name in _POSITIONS)


def declared_vocab_size(model_dir: Path) -> int | None:
    """Ids that a model knows, as its config.json says; else None."""
    return _positive([read_model_config(model_dir).vocab_size])


def _positive(values: Iterable[Any]) -> int | None:
    """The first that is a positive integer."""
    return next((value for value in values if isinstance(value, int) and value > 0), None)
