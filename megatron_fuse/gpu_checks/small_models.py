"""Makes a tokenizer, random models of three kinds, and instructions, all within a second."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from megatron_fuse.gpu_checks.synthetic import LLAMA_TINY

_POSITIONS = 256
_SPECIALS = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_THINGS = (
    "apples",
    "boats",
    "candles",
    "doors",
    "engines",
    "flutes",
    "gardens",
    "hats",
    "islands",
    "jars",
    "kettles",
)
_COLOURS = ("red", "green", "blue", "black", "white")


def write_instructions(path: Path, count: int) -> None:
    """Writes so many instructions as JSONL in Alpaca form."""
    draw = random.Random(1)
    rows = []
    for number in range(count):
        things = draw.sample(_THINGS, 2 + number % 5)
        colour = draw.choice(_COLOURS)
        asked = f"Name {len(things)} things that are {colour}, in order. ({number})"
        rows.append(
            {"id": str(number), "instruction": asked, "output": f"{', '.join(sorted(things))}: all {colour}."}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_models(directory: Path) -> dict[str, Path]:
    """Writes alpha (Llama), beta (GPT-NeoX with another tokenizer) and reward (a reward model).

    Returns name -> directory.
    """
    sizes = {
        key: value for key, value in LLAMA_TINY.items() if key not in ("vocab_size", "tie_word_embeddings")
    }
    paths = {name: directory / name for name in ("alpha", "beta", "reward")}
    vocab = {
        name: _write_tokenizer(path, 300 + 10 * index) for index, (name, path) in enumerate(paths.items())
    }
    llama: dict[str, Any] = {**sizes, "max_position_embeddings": _POSITIONS}
    neox = {key: value for key, value in llama.items() if key != "num_key_value_heads"}
    torch.manual_seed(11)
    _write(paths["alpha"], LlamaForCausalLM(LlamaConfig(vocab_size=vocab["alpha"], **llama)))
    _write(paths["beta"], GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab["beta"], **neox)))
    reward = LlamaConfig(**{**llama, "vocab_size": vocab["reward"], "num_labels": 1})
    _write(paths["reward"], LlamaForSequenceClassification(reward))
    return paths


def _write(directory: Path, model: PreTrainedModel) -> None:
    """Saves a model with random weights. They are so large that the attended tokens decide the next token."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)


def _write_tokenizer(directory: Path, vocab_size: int) -> int:
    """Writes a byte-level BPE tokenizer with the ChatML template. Returns the number of ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [" ".join(_THINGS), " ".join(_COLOURS), "Name things that are in order."], trainer
    )
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "chat_template": _CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer.get_vocab_size()
