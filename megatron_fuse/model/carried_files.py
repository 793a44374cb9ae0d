"""The files of a Hugging Face model directory besides the weights:
tokenizer, chat template, generation options, config."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from megatron_fuse.model.config_file import ends_of_answers, read_model_config
from megatron_fuse.model.weight_files import DTYPES
from megatron_fuse.storage.strict_json import read_object

logger = logging.getLogger(__name__)

# The files that tokenizer, chat template and generation need besides the weights.
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*.model",  # SentencePiece
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)


def copy_beside_weights(reference: Path, directory: Path) -> None:
    """Copies the files of the model in `reference` into `directory`, without its weights and its config."""
    for pattern in CARRIED_FILES:
        for file in filter(Path.is_file, reference.glob(pattern)):
            carried = directory / file.relative_to(reference)
            carried.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, carried)


def write_beside_weights(reference: Path, directory: Path, dtype: str) -> None:
    """Copies the files of the model in `reference` into `directory`, without its weights. The config gets
    `dtype` (fp32, bf16, fp16).

    The written weights are plain: a quantization_config of the config is left out, with a
    warning.
    """
    copy_beside_weights(reference, directory)
    config = read_object(reference / "config.json")
    if config.pop("quantization_config", None) is not None:
        logger.warning(
            f"config.json: quantization_config of {reference} left out: the weights written are plain {dtype}"
        )
    write_config(directory, config, dtype)


def write_config(directory: Path, config: dict[str, Any], dtype: str) -> None:
    """Writes a config.json that states the dtype of the weights in the directory (fp32, bf16 or fp16)."""
    # transformers before version 5, and other programs, read only torch_dtype. Without it they would load the
    # weights in fp32.
    named = str(DTYPES[dtype]).removeprefix("torch.")
    content = config | {"dtype": named, "torch_dtype": named}
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def missing_end(model_dir: Path, stop_id: int) -> bool:
    """Whether servers of a model directory do not end an answer at this token.

    That is so if its generation_config.json does not list the token or, if that lists no token, its
    config.json does not.
    """
    return stop_id not in ends_of_answers(model_dir)


def add_end(model_dir: Path, stop_id: int) -> None:
    """Adds a token to the ends of answers in generation_config.json.

    The file is made if there is none. Other ends stay.
    """
    path = model_dir / "generation_config.json"
    config = read_model_config(model_dir)
    if path.exists():
        options = read_object(path)
    else:  # the values that transformers then takes from the config
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        options = {key: value for key in keys if (value := getattr(config, key)) is not None}
    options["eos_token_id"] = [*ends_of_answers(model_dir), stop_id]
    path.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
