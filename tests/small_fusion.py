"""A small world with every stage before fusion data: a target with a SentencePiece-like tokenizer, three
sources of three families with three tokenizers and templates, answers from a file, scores drawn at random."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_models import save_model, small_recipe, write_rows
from small_tokenizers import byte_level, llama_json
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from megatron_fuse.capture import capture
from megatron_fuse.dataset import build_fusion_data
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring.scores import SCORES
from megatron_fuse.stages import Context
from megatron_fuse.storage import read_sealed, run_plan, sha256_of_file, write_sealed

SOURCES = ("alpha", "beta", "gamma")
RESPONSES = [
    "Sure: the internationalization of 123 stations is 45.",
    "日本 and été are words.\n\n  Indented\ttext, 12 + 30 = 42. 🙂",
    "Yes.",
    " begins with a space, and ends with one ",
    "1, 2, 3 and café nations answer the user",
    "▁ literal, </s> and <|im_end|> as text.",
]


def _save(directory: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> Path:
    with torch.no_grad():
        # Wide enough that what a token attends to decides what comes next.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_llama(directory: Path) -> Path:
    """A random Llama with Llama-2's kind of tokenizer; four more columns of logits than ids."""
    tokenizer = llama_json()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=len(tokenizer) + 4, max_position_embeddings=256, **sizes)
    return _save(directory, tokenizer, LlamaForCausalLM(config))


def save_mpt(directory: Path) -> Path:
    """A random MPT with GPT-NeoX's kind of tokenizer, trained on other text than beta's."""
    tokenizer = byte_level()
    torch.manual_seed(6)
    config = MptConfig(vocab_size=len(tokenizer) + 7, max_seq_len=256, d_model=32, n_heads=4, n_layers=2)
    return _save(directory, tokenizer, MptForCausalLM(config))


def save_models(root: Path) -> dict[str, Path]:
    """target (also the source alpha), beta and gamma, and a reward model."""
    models = {"target": save_llama(root / "target")}
    models["alpha"] = models["target"]
    models["beta"] = save_model(root / "beta", "gpt_neox", seed=1, positions=256)
    models["gamma"] = save_mpt(root / "gamma")
    for name in ("one", "two"):
        models[name] = save_model(root / name, "llama", seed=3, reward=True, positions=256)
    return models


def fusion_recipe(
    root: Path, models: dict[str, Path], sources: tuple[str, ...] = SOURCES, **sections: Any
) -> Recipe:
    """A recipe over the data that `write_data` put under root."""
    options = {
        name: {"model": str(models[name]), "responses": str(root / f"{name}.jsonl")} for name in sources
    }
    for name in set(sources) & {"alpha"}:
        options[name]["chat_template"] = "vicuna_v1.1"
    recipe = small_recipe(
        root / "run",
        root / "data.jsonl",
        models["target"],
        options,
        **{
            "data": {"shard_size": 5, "validation_samples": 3},
            "training": {"seq_length": 200},
            "schedule": {"preset": "profuser"},
            "reward_models": {name: {"model": str(models[name])} for name in ("one", "two")},
            **sections,
        },
    )
    target = recipe.target.model_copy(update={"chat_template": "vicuna_v1.1"})
    return recipe.model_copy(update={"target": target})


def write_data(root: Path, examples: int = 13) -> None:
    """Instructions, and an answer of every source to most of them: some empty, some missing, some the
    same.
    """
    texts = [RESPONSES[n % len(RESPONSES)] for n in range(examples)]
    rows = [
        {"id": f"e{n}", "instruction": f"Question {n}?", "output": text, "category": "abc"[n % 3]}
        for n, text in enumerate(texts)
    ]
    write_rows(root / "data.jsonl", rows)
    for place, source in enumerate(SOURCES):
        answers = []
        for n in range(examples):
            text = RESPONSES[(n + (place if n % 3 else 0)) % len(RESPONSES)] if n % 7 != place else ""
            if n != 4 + place:
                answers.append({"id": f"e{n}", "response": text, "truncated": n % 4 == 1})
        write_rows(root / f"{source}.jsonl", answers)


def run_before_fusion(recipe: Recipe, seed: int = 11) -> None:
    """Everything that build_fusion_data reads."""
    prepare_instructions(Context(recipe))
    for place, source in enumerate(recipe.sources):
        generate_responses(Context(recipe), source)
        for mode in ("training", "inference"):
            capture(Context(recipe), source, mode)
        for reward_model_place, reward_model in enumerate(recipe.reward_models):
            random = np.random.default_rng([seed, place, reward_model_place])

            def draw(index: int, prefix: Path, random: np.random.Generator = random) -> dict[str, int]:
                examples = len(
                    Path(recipe.workdir / f"instructions/examples.{index:05d}.jsonl").read_text().splitlines()
                )
                np.save(
                    prefix.with_name(prefix.name + ".npy"), random.integers(0, 3, examples).astype(np.float32)
                )
                return {}

            run_plan(Context(recipe).plan(SCORES, source, reward_model), draw)


def build_world(root: Path) -> Recipe:
    """Every stage up to fusion data, with all sources."""
    models = save_models(root / "models")
    write_data(root)
    recipe = fusion_recipe(root, models)
    run_before_fusion(recipe)
    build_fusion_data(Context(recipe))
    return recipe


def own_up(path: Path) -> None:
    """Makes the manifest say what the file now holds, as if the stage had written it."""
    manifest = path.parent / "manifest.json"
    content = read_sealed(manifest)
    content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    write_sealed(manifest, content)
