"""Loads models into this process: complete, checked, and on this process's device."""

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.bars import without_bars
from megatron_fuse.huggingface.loading_checks import check_after_loading, check_before_loading
from megatron_fuse.huggingface.resolving import resolve_model, trust_key
from megatron_fuse.model.expected_weights import refuse_non_finite
from megatron_fuse.model.weight_files import DTYPES
from megatron_fuse.own_code import not_loadable
from megatron_fuse.recipe import AnsweringOptions


def this_device() -> torch.device:
    """This process's GPU (LOCAL_RANK under torchrun), or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def load_model(
    auto_class: Any,
    model_name: str,
    *,
    dtype: str,
    trust_remote_code: bool,
    device_map: str | None = None,
    device: torch.device | None = None,
    where: str = "model",
) -> Any:
    """The model that `auto_class.from_pretrained` loads, in evaluation mode and without gradients.

    model_name: a directory, or a hub name in the local cache. device: default this_device(). device_map: if
    set, it places the model in place of `device`. where: the recipe key of the model's options
    (`sources.mpt`), for errors.

    Raises UserError for a model that cannot be loaded completely, as transformers itself would fill in random
    weights, and for weights that are not finite.
    """
    directory = resolve_model(model_name, f"{where}.model")
    check_before_loading(
        auto_class,
        directory,
        f"{where}.model",
        trust_remote_code=trust_remote_code,
        allowed_by=trust_key(where),
    )
    try:
        with without_bars():
            model, report = auto_class.from_pretrained(
                directory,
                dtype=DTYPES[dtype],
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # They are then in the report, for which check_after_loading raises UserError.
                ignore_mismatched_sizes=True,
                **({"device_map": device_map} if device_map else {}),
            )
    except Exception as error:  # transformers raises many types for missing, damaged or unknown files
        raise not_loadable(directory, error, f"{where}.model", trust_key(where)) from error
    check_after_loading(model, report, directory, f"{where}.model")
    model.eval().requires_grad_(False)
    if not device_map:
        model.to(device or this_device())
    for name, parameter in model.named_parameters():
        if parameter.dtype in DTYPES.values() and parameter.device.type != "meta":
            refuse_non_finite(parameter, f"{where}.model: {directory}: {name}")
    return model


def load_causal_lm(
    options: AnsweringOptions, device: torch.device | None = None, where: str = "model"
) -> Any:
    """The language model of a source or of the target. Raises UserError as load_model does."""
    return load_model(
        AutoModelForCausalLM,
        options.model,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        device_map=options.device_map,
        device=device,
        where=where,
    )


def input_device(model: Any) -> torch.device:
    """The device for a model's token ids: that of its embedding.

    With device_map the head may be on another device. If device_map keeps the embedding off every device, its
    device is "meta". accelerate then moves the input itself, from the CPU.
    """
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def refuse_unknown_ids(model: Any, largest: int, where: str) -> None:
    """Raises UserError if the largest id of a text is not in the model's vocabulary.

    where: the model's recipe key. The ids of texts are compared, not the size of the tokenizer: a padding
    token that no text uses may lie beyond the embedding.
    """
    refuse_ids_beyond(model.get_input_embeddings().weight.shape[0], largest, where)


def refuse_ids_beyond(known: int, largest: int, where: str) -> None:
    """refuse_unknown_ids for a model that knows the ids below `known`."""
    if largest >= known:
        raise UserError(
            f"{where}: the tokenizer has the id {largest}, but the model knows only {known} ids. The "
            "tokenizer belongs to another model: fetch the model again, with its own tokenizer."
        )
