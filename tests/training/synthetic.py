"""A fusion dataset of random documents and a tiny random target, for tests of training that need no stage
before it.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from target_families import FAMILIES, MIXTURES
from transformers import AutoModelForCausalLM

from megatron_fuse.fusion_data.documents import Document
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.selection.rules import NONE
from megatron_fuse.storage import Artifact


class SyntheticDataset:
    """The reader's interface over documents drawn from a seed. Some examples have no winning answer; one has
    no teacher rows. Of three sources the last wins so rarely that it is in some steps alone.

    With margins every third example counts less, by another weight in either mode.
    """

    def __init__(
        self,
        *,
        examples: int = 53,
        validation: int = 6,
        vocab_size: int = 503,
        entries: int = 5,
        seed: int = 0,
        margins: bool = False,
    ):
        self.entries_per_row = entries
        self.example_ids = [f"example-{index}" for index in range(examples + validation)]
        self.train, self.validation = np.arange(examples), np.arange(examples, examples + validation)
        self.artifacts: list[Artifact] = []
        self.curriculum = None
        self.sha256 = f"synthetic-{seed}-{examples}"
        barely = margins & (np.arange(examples + validation) % 3 == 1)
        self.weights = {"inference": np.where(barely, 0.3, 1), "training": np.where(barely, 0.7, 1)}
        self.documents = _draw_documents(examples + validation, vocab_size, entries, seed)
        self.sources = ["alpha", "beta", "gamma"]
        draw = np.random.default_rng((seed, 1))
        self.won = {
            mode: np.array(
                [self._winner(draw, mode, index) for index in range(examples + validation)], np.int16
            )
            for mode in ("inference", "training")
        }

    def _winner(self, rng: np.random.Generator, mode: str, index: int) -> int:
        document = self.documents[mode, index]
        if document is None or not document.counts.any():
            return NONE
        return int(rng.choice(3, p=[0.5, 0.45, 0.05]))

    def _per_example(self, mode: str, of_document: Any) -> np.ndarray:
        chosen = (self.documents[mode, index] for index in range(len(self.example_ids)))
        return np.array([0 if document is None else of_document(document) for document in chosen])

    def lengths(self, mode: str) -> np.ndarray:
        return self._per_example(mode, lambda document: len(document.tokens))

    def supervised_tokens(self, mode: str) -> np.ndarray:
        return self._per_example(mode, lambda document: document.supervised.sum())

    def example_weights(self, mode: str) -> np.ndarray:
        return self.weights[mode].astype(np.float32)

    def winners(self, mode: str) -> np.ndarray:
        return self.won[mode]

    def document(self, mode: str, example: int) -> Document:
        found = self.documents[mode, example]
        assert found is not None
        return found


@cache
def _draw_documents(
    examples: int, vocab_size: int, entries: int, seed: int
) -> dict[tuple[str, int], Document | None]:
    """By mode and example."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, int], Document | None] = {}
    for index in range(examples):
        for mode in ("inference", "training"):
            missing = mode == "inference" and index % 11 == 3
            found[mode, index] = None if missing else _draw(rng, vocab_size, entries, rows=index != 5)
    return found


def _draw(rng: np.random.Generator, vocab_size: int, entries: int, *, rows: bool) -> Document:
    prompt, response = rng.integers(2, 9), rng.integers(1, 21)
    counts = rng.integers(0, entries + 1, response).astype(np.uint8) * np.uint8(rows)
    # A row's mass: at most 0.9, spread at random over its entries.
    logprobs = [np.log(0.9 * rng.dirichlet(np.ones(count))) for count in counts if count]
    ids = [rng.choice(vocab_size, count, replace=False) for count in counts if count]
    return Document(
        tokens=rng.integers(0, vocab_size, prompt + response),
        supervised=np.arange(prompt + response) >= prompt,
        counts=counts,
        match=(counts > 0).astype(np.uint8),
        teacher_ids=np.concatenate([*ids, np.zeros(0, np.int64)]),
        teacher_logprobs=np.concatenate([*logprobs, np.zeros(0)]).astype(np.float32),
    )


def make_tiny_target(
    directory: Path,
    *,
    vocab_size: int = 503,
    layers: int = 2,
    tied: bool = False,
    family: str = "llama",
) -> Path:
    """A random model with grouped-query attention. Families with kinds of layers need four layers."""
    torch.manual_seed(7)
    config_class, further = (FAMILIES | MIXTURES)[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # logits far from uniform, so that every part of the loss counts
        **further,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def make_tiny_recipe(workdir: Path, target: Path, **sections: dict[str, Any]) -> Recipe:
    content: dict[str, Any] = {
        "workdir": str(workdir),
        "target": {"model": str(target)},
        "sources": {"a": {"model": str(target)}},
        "data": {"path": "none.jsonl"},
        "schedule": {"preset": "profuser"},
        "training": {
            "seq_length": 32,
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "lr": 1e-3,
            "precision": "fp32",
            "train_iters": 20,
        },
    }
    for section, options in sections.items():
        content[section] = {**content.get(section, {}), **options}
    return make_recipe(content)
