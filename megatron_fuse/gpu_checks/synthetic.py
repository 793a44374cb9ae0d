"""Random documents with teacher rows, and a target without weights: for training without other stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

from megatron_fuse.fusion_data.documents import Document
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.runtime import Runtime
from megatron_fuse.selection.rules import NONE
from megatron_fuse.storage import Artifact

_LABELS = 0.75  # share of the tokens that are labels
_MASS = 0.9  # mass of a teacher's row on its entries

# Llama 3.2 1B: 1.24 billion parameters, with tied embedding and output layer.
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_TINY = {
    "vocab_size": 503,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


class RandomDocuments:
    """The interface of FusionDataset over one document of each length, all of the training mode.

    positions: number of positions of each document, one less than its tokens. entries: number of entries of a
    teacher's row, 0 for documents without a teacher.
    """

    def __init__(self, positions: Sequence[int], vocab_size: int, entries: int, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.entries_per_row = entries + 1 if entries else 0
        self.example_ids = [str(number) for number in range(len(positions))]
        self.train, self.validation = np.arange(len(positions)), np.arange(0)
        self.artifacts: list[Artifact] = []
        self.curriculum = None
        self.sha256 = f"random-{seed}"
        self.sources = ["teacher"]
        self.won = np.full(len(positions), 0 if entries else NONE, np.int16)
        self.documents = [_document(draw, count + 1, vocab_size, entries) for count in positions]

    def lengths(self, mode: str) -> np.ndarray:
        return np.array([len(document.tokens) for document in self.documents])

    def supervised_tokens(self, mode: str) -> np.ndarray:
        return np.array([document.supervised.sum() for document in self.documents])

    def example_weights(self, mode: str) -> np.ndarray:
        return np.ones(len(self.documents), np.float32)

    def winners(self, mode: str) -> np.ndarray:
        return self.won

    def document(self, mode: str, example: int) -> Document:
        return self.documents[example]


def _document(draw: np.random.Generator, tokens: int, vocab_size: int, entries: int) -> Document:
    labels = max(int(_LABELS * tokens), 1)
    return Document(
        tokens=draw.integers(0, vocab_size, tokens),
        supervised=np.arange(tokens) >= tokens - labels,
        counts=np.full(labels, entries, np.uint8),
        match=np.full(labels, bool(entries), np.uint8),
        # One id from each of several equal parts of the vocabulary, so that the ids of a row differ.
        teacher_ids=(
            draw.integers(0, vocab_size // max(entries, 1), (labels, entries)) + _parts(vocab_size, entries)
        ).ravel(),
        teacher_logprobs=np.log(_MASS * draw.dirichlet(np.ones(max(entries, 1)), labels))[
            :, :entries
        ].ravel(),
    )


def _parts(vocab_size: int, entries: int) -> np.ndarray:
    return np.arange(entries) * (vocab_size // max(entries, 1))


def recipe_of_random_target(
    directory: Path, sizes: dict[str, Any], seq_length: int, **sections: dict[str, Any]
) -> Recipe:
    """A recipe whose target is a Llama of these sizes, with a config and without weights.

    sections: options laid over it.
    """
    target = directory / "target"
    LlamaConfig(
        **sizes, max_position_embeddings=seq_length, architectures=["LlamaForCausalLM"]
    ).save_pretrained(target)
    content: dict[str, Any] = {
        "workdir": str(directory / "run"),
        "target": {"model": str(target)},
        "sources": {"source": {"model": str(target)}},
        "data": {"path": "none.jsonl"},
        "schedule": {"preset": "fuse"},
        "training": {"seq_length": seq_length, "precision": "bf16"},
    }
    for section, options in sections.items():
        content[section] = {**content.get(section, {}), **options}
    return make_recipe(content)


def random_trainer(recipe: Recipe, runtime: Runtime, dataset: RandomDocuments) -> Any:
    """A Trainer whose target has random weights. The runtime must be started."""
    from megatron_fuse.target import read_target
    from megatron_fuse.training.target import build_chunks
    from megatron_fuse.training.trainer import make_trainer

    architecture = read_target(recipe).architecture
    chunks = build_chunks(recipe, architecture, perform_initialization=True)
    return make_trainer(recipe, runtime, architecture, chunks, dataset)  # type: ignore[arg-type]
