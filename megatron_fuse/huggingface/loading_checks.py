"""Checks of a model directory before and after transformers loads it.

transformers fills in random weights for tensors that the files lack, leaves out tensors that the config does
not ask for, and allocates any size that the config states. It does all this silently, or with a line in a
log.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from megatron_fuse.errors import UserError
from megatron_fuse.model.config_file import ModelConfig, check_model_directory, load_config, reason
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.text_safety import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # takes seconds, also for commands that load no model

_QUANTISED = 16  # most elements per byte of a quantised file; more than any format has


def check_before_loading(
    auto_class: Any, directory: Path, where: str, *, trust_remote_code: bool, allowed_by: str | None = None
) -> None:
    """Raises UserError for a damaged file, or if the config describes more than the weight files can hold.

    auto_class: its `from_config` makes the model on the meta device, without memory. where: the recipe's key
    (`sources.mpt.model`), for errors. allowed_by: the option that lets the model's own code run.
    """
    stated = check_model_directory(directory)
    weights = WeightFiles(directory)
    weights.open_all()
    check_layers(stated, weights, directory, where)
    config = load_config(directory, trust_remote_code=trust_remote_code, allowed_by=allowed_by)
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and torch raise many kinds for an unknown or impossible model
        raise UserError(
            f"{where}: transformers cannot make a model from {directory / 'config.json'} ({sizes(config)}): "
            f"{reason(error, config)}"
        ) from error
    check_size(model, config, weights, directory, where)


def check_layers(stated: ModelConfig, weights: WeightFiles, directory: Path, where: str) -> None:
    """Raises UserError if the config has more layers than there are tensors: making them takes too long."""
    if stated.layers and stated.layers > len(weights.file_of):
        raise UserError(
            f"{where}: {directory / 'config.json'} has {stated.layers} layers ({sizes(stated)}), but "
            f"{weights.model_dir} holds only {len(weights.file_of)} tensors. Config and weights do not "
            "belong together: fetch the model again."
        )


def check_size(
    model: torch.nn.Module, config: PreTrainedConfig, weights: WeightFiles, directory: Path, where: str
) -> None:
    """Raises UserError if a model has more elements than the weight files have room for.

    model: on the meta device.

    directory: of the config.json that `config` was read from.
    """
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    room = weights.open_all() * (_QUANTISED if getattr(config, "quantization_config", None) else 1)
    if elements > room:
        raise UserError(
            f"{where}: {directory / 'config.json'} describes a model of {elements} elements "
            f"({sizes(config)}), but the weight files of {weights.model_dir} have room for at most {room}. "
            "Config and weights do not belong together: fetch the model again."
        )


def check_after_loading(
    model: "PreTrainedModel", report: dict[str, Any], directory: Path, where: str
) -> None:
    """Raises UserError if transformers reports missing weights, other shapes, or layers that it left out.

    report: the loading info of from_pretrained. where: the recipe's key, for errors.
    """
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise UserError(
            f"{where}: {directory} has no weights for {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}, "
            f"so these would be random ({sizes(model.config)}). Name a model that was saved as "
            f"{type(model).__name__} with all its weights."
        )
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"])
        raise UserError(
            f"{where}: {directory}: {brief(name, 100)} has shape {list(stored)}, but config.json gives "
            f"{list(expected)} ({sizes(model.config)}). Config and weights do not belong together: fetch the "
            "model again."
        )
    known = {_layer_name(name) for name in model.state_dict()}
    further = [name for name in report["unexpected_keys"] if _layer_name(name) in known]
    # Layers that predict several tokens at once follow the other layers. transformers does not use them and
    # leaves them out.
    if further and not getattr(model.config.get_text_config(), "num_nextn_predict_layers", None):
        raise UserError(
            f"{where}: {directory} holds {brief(min(further), 100)}, but the model of config.json has no "
            f"such tensor ({sizes(model.config)}). Config and weights do not belong together: fetch the "
            "model again."
        )


def sizes(config: ModelConfig | PreTrainedConfig) -> str:
    """The sizes and switches of a config as one line, by the keys of its model family.

    A config of transformers includes its defaults.
    """
    config = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    keys = [key for key in ModelConfig.model_fields if key not in getattr(config, "attribute_map", {})]
    named = {key: getattr(config, key, None) for key in keys if not key.endswith(("_window", "_labels"))}
    return (
        brief(", ".join(f"{key} {value}" for key, value in named.items() if type(value) in (int, bool)), 220)
        or "no sizes"
    )


def _layer_name(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)
