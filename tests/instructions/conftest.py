"""Fixtures of the tests of instructions."""

from pathlib import Path

import pytest
from small_models import save_tokenizer
from transformers import LlamaConfig


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target and two sources with vocabularies of other sizes; only tokenizer and config, which is all
    this stage reads.
    """
    root = tmp_path_factory.mktemp("models")
    for name, vocab_size in {"target": 300, "coarse": 340, "bytes": 260}.items():
        save_tokenizer(root / name, vocab_size)
        LlamaConfig(vocab_size=340, architectures=["LlamaForCausalLM"]).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}
