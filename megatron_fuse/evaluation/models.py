"""The models of an evaluation: Hugging Face model directories with a name. Their files identify them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fuse.errors import UserError, shortened
from megatron_fuse.recipe import user_path
from megatron_fuse.storage import sha256_of_parts

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # becomes a directory name
# Files that decide how text becomes ids, and how generation ends. All of them are small.
_TEXT_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
_TEMPLATE_FILES = ("chat_template*", "generation_config.json")


@dataclass(frozen=True)
class EvaluatedModel:
    name: str
    directory: Path


def models_named(texts: Sequence[str]) -> list[EvaluatedModel]:
    """Models given as `NAME=DIR`.

    Raises UserError for another form, a name given twice, or a directory without model.
    """
    models: dict[str, EvaluatedModel] = {}
    for text in texts:
        name, equals, directory = text.partition("=")
        if not equals or not _NAME.fullmatch(name) or not directory:
            raise UserError(
                f"{text!r} is not of the form NAME=DIR. Write every model as NAME=DIR, with letters, digits, "
                "dots, - and _ in the name."
            )
        if name in models:
            raise UserError(
                f"the name {name!r} is given twice, for {models[name].directory} and {directory}. Rename "
                "one of them."
            )
        try:
            models[name] = EvaluatedModel(name, user_path(directory))
        except ValueError as error:
            raise UserError(f"{name}: {error} (given: {shortened(directory, 80)!r})") from error
        if not (models[name].directory / "config.json").is_file():
            raise UserError(f"{name}: {directory} has no config.json. Name a Hugging Face model directory.")
    return list(models.values())


def fingerprint(directory: Path) -> str:
    """sha256 over a model's configuration, weights (sampled), tokenizer, chat template and generation
    options.
    """
    from megatron_fuse.huggingface.fingerprints import model_fingerprint  # imports torch

    files = {
        path
        for pattern in (*_TEXT_FILES, *_TEMPLATE_FILES)
        for path in directory.glob(pattern)
        if path.is_file()
    }
    parts = [part for path in sorted(files) for part in (path.name.encode(), path.read_bytes())]
    return sha256_of_parts(model_fingerprint(directory), *parts)
