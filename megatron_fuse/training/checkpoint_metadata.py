"""What a checkpoint says of itself, and which checkpoint a directory names. Readable without Megatron."""

import importlib.metadata
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.storage.strict_json import parse_object
from megatron_fuse.training.checkpoint_files import (
    LATEST,
)
from megatron_fuse.training.checkpoint_integrity import CheckpointFiles

# The sizes that decide whether weights fit.
# The padded vocabulary alone is not enough: 1003 and 1024 both pad to 1024.
_MODEL_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "padded_vocab_size",
    "qkv_bias",
    "tied_embeddings",
)
# What decides the norms and experts of a layer, with the values of a Llama. Only other values are written:
# checkpoints from before these keys are of layers like a Llama's.
_LAYER_KEYS = ("norms_before", "norms_after", "zero_centered_norms", "query_key_norm", "experts")
_LLAMA_LAYER = {field.name: field.default for field in fields(Architecture) if field.name in _LAYER_KEYS}


@dataclass(frozen=True)
class CheckpointMetadata:
    """The content of a checkpoint's facts.json, readable without Megatron."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    iteration: Annotated[int, Field(ge=0, strict=True)]  # steps done
    consumed_samples: Annotated[int, Field(ge=0, strict=True)]
    model: dict[str, Any]  # sizes of the architecture
    run: dict[str, Any]  # what a resumed run must share: phases, batch size, seed, loss, order, data hash
    # Least validation cross-entropy so far, nats per token.
    best_loss: Annotated[float, Field(strict=True)] | None
    versions: dict[str, str]
    # The form of its state; empty without an optimizer.
    optimizer: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)  # for human readers; empty for imported weights


def model_identity(architecture: Architecture) -> dict[str, Any]:
    sizes = {key: getattr(architecture, key) for key in _MODEL_KEYS}
    layer = {key: getattr(architecture, key) for key in _LAYER_KEYS}
    layer["experts"] = architecture.experts and asdict(architecture.experts)
    return sizes | {key: value for key, value in layer.items() if value != _LLAMA_LAYER[key]}


def versions() -> dict[str, str]:
    return {name: _version(name) for name in ("megatron-fuse", "torch", "megatron-core")}


def _version(package: str) -> str:
    """The version of an installed package.

    A package that runs from its source tree is not installed and has none.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def named_checkpoint(directory: Path, which: str = LATEST) -> Path | None:
    """The checkpoint that LATEST or BEST names, None if the file does not exist.

    Raises UserError if the named checkpoint is missing or incomplete,
    or if the file holds no iteration number.
    """
    iteration = named_iteration(directory, which)
    if iteration is None:
        return None
    path = iteration_directory(directory, iteration)
    if not (path / "facts.json").exists():
        raise UserError(
            f"{directory / which} names iteration {iteration}, but {path} is missing or incomplete. Write "
            "the iteration of another checkpoint into that file."
        )
    return path


def named_iteration(directory: Path, which: str) -> int | None:
    tracker = directory / which
    if not tracker.exists():
        return None
    try:
        content = tracker.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{tracker}: cannot be read ({error.strerror})") from error
    if not re.fullmatch(rb"[0-9]{1,12}", content):
        raise UserError(
            f"{tracker}: it holds {content[:40]!r} instead of an iteration number. Write the iteration of a "
            f"checkpoint in {directory} into it."
        )
    return int(content)


def iteration_directory(directory: Path, iteration: int) -> Path:
    return directory / f"iter_{iteration:07d}"


def read_metadata(path: Path, *, verify: bool = True) -> CheckpointMetadata:
    """The content of facts.json. verify: compare its checksum.

    Raises UserError if it is missing or not of this version.
    """
    return metadata_in(open_files(path, verify))


def open_files(path: Path, verify: bool) -> CheckpointFiles:
    if not (path / "facts.json").exists():
        raise UserError(
            f"{path}: not a complete checkpoint, because there is no facts.json. Name a directory "
            "iter_XXXXXXX of a finished save."
        )
    return CheckpointFiles(path, verify=verify)


def metadata_in(files: CheckpointFiles) -> CheckpointMetadata:
    path = files.path
    place = path / "facts.json"
    content = parse_object(files.content(place.name), str(place))
    try:
        metadata = TypeAdapter(CheckpointMetadata).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(str(part) for part in first['loc'])[:100]}: {first['msg']}"
        raise UserError(
            f"{place}: not a checkpoint of this version ({what}). Name another checkpoint."
        ) from error
    if re.fullmatch(r"iter_[0-9]+", path.name) and int(path.name.removeprefix("iter_")) != metadata.iteration:
        raise UserError(
            f"{path} holds the checkpoint of iteration {metadata.iteration}, as its facts.json says. Rename "
            "the directory to the name of that iteration."
        )
    return metadata


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One text for each key in which a checkpoint differs from this run, with both values. Of two mappings
    only what differs is shown.

    stored: the checkpoint's values.
    wanted: those of this run.
    """
    texts = []
    for key, value in wanted.items():
        stored_value = stored.get(key)
        if stored_value == value:
            continue
        if isinstance(value, dict) and isinstance(stored_value, dict):
            same = {name for name in value if name in stored_value and stored_value[name] == value[name]}
            stored_value, value = (
                {name: side[name] for name in side if name not in same} for side in (stored_value, value)
            )
        texts.append(f"has {key} = {stored_value!r}, but this run has {key} = {value!r}")
    return texts


def refuse_other_model(path: Path, metadata: CheckpointMetadata, architecture: Architecture) -> None:
    """Raises UserError if a checkpoint holds another model or vocabulary."""
    stored, wanted = _LLAMA_LAYER | metadata.model, _LLAMA_LAYER | model_identity(architecture)
    if differing := differences(stored, wanted):
        raise UserError(
            f"{path}: the checkpoint {'; '.join(differing)}. Load it into the model that it was made from."
        )
