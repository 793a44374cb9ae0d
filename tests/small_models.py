"""Tokenizers and random models of three architectures, small enough to make for a test, and recipes that
use them.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MptConfig,
    MptForCausalLM,
    MptForSequenceClassification,
)

from megatron_fuse.recipe import Recipe, make_recipe

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "What is 12 + 30? It is 42.",
    "Sort: pear, apple, fig.",
]
SPECIALS = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FAMILIES = ("llama", "mpt", "gpt_neox")


def save_tokenizer(directory: Path, vocab_size: int = 300, pad: str = "<|pad|>") -> int:
    """Byte-level BPE with ChatML; returns the number of ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": pad,
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def save_model(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    positions: int = 128,
    reward: bool = False,
    **tokenizer: object,
) -> Path:
    """A random model with its tokenizer.

    Its logits have more columns than the tokenizer has ids, as real ones do.
    """
    vocab_size = save_tokenizer(directory, **tokenizer) + 5
    labels = {"num_labels": 1} if reward else {}
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=positions, **sizes, **labels)
        kinds = LlamaForCausalLM, LlamaForSequenceClassification
    elif family == "mpt":
        config = MptConfig(
            vocab_size=vocab_size, max_seq_len=positions, d_model=32, n_heads=4, n_layers=2, **labels
        )
        kinds = MptForCausalLM, MptForSequenceClassification
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = GPTNeoXConfig(vocab_size=vocab_size, max_position_embeddings=positions, **sizes, **labels)
        kinds = GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
    config.pad_token_id = None
    torch.manual_seed(seed)
    model = kinds[reward](config)
    with torch.no_grad():
        # Wide enough that what a token attends to decides what comes next.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    model.save_pretrained(directory)
    return directory


def small_recipe(
    workdir: Path, data: Path, target: Path, sources: dict[str, object], /, **sections: object
) -> Recipe:
    """A recipe in fp32. sources: name -> directory, or -> options of its own."""
    named = {
        name: {"dtype": "fp32", **(value if isinstance(value, dict) else {"model": str(value)})}
        for name, value in sources.items()
    }
    content = {
        "workdir": str(workdir),
        "target": {"model": str(target)},
        "sources": named,
        "data": {"path": str(data), **sections.pop("data", {})},  # type: ignore[dict-item]
        "schedule": {"preset": "fuse"},
        "training": {"seq_length": 128, **sections.pop("training", {})},  # type: ignore[dict-item]
        **sections,
    }
    return make_recipe(content)


def write_rows(path: Path, rows: list[object]) -> Path:
    """JSONL; a row that is text already is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
