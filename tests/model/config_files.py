"""Configs of a small Llama, with changes, and the message of a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fuse.errors import UserError

Change = dict[str, Any] | str | bytes | Callable[[Path], None]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
}


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    assert len(str(caught.value)) <= 600
    return str(caught.value)


def write_config(directory: Path, change: Change) -> Path:
    """A key whose value is ... is left out."""
    path = directory / "config.json"
    if callable(change):
        change(path)
    elif isinstance(change, dict):
        path.write_text(
            json.dumps({key: value for key, value in (CONFIG | change).items() if value is not ...})
        )
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    return directory
