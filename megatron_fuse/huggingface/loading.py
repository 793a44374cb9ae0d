"""Models in process: loaded whole, checked, on this process's device."""

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.loading_checks import check_after_loading, check_before_loading
from megatron_fuse.huggingface.resolving import resolve_model, trust_key
from megatron_fuse.model.expected_weights import refuse_non_finite
from megatron_fuse.model.weight_files import DTYPES
from megatron_fuse.own_code import not_loadable
from megatron_fuse.recipe import AnsweringOptions


def this_device() -> torch.device:
    """This process's GPU under torchrun, the CPU where there is none."""
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
    """What `auto_class.from_pretrained` gives, in evaluation mode and without gradients.

    `model_name`: a directory, or a hub name in the local cache. `device` defaults to this process's own; `device_map`, where set,
    places the model instead. `where` is the recipe key of the model's options (`sources.mpt`), for errors. Raises UserError for a
    model that cannot be loaded whole: transformers itself would fill in random weights.
    """
    directory = resolve_model(model_name, f"{where}.model")
    check_before_loading(
        auto_class,
        directory,
        f"{where}.model",
        trust_remote_code=trust_remote_code,
        allowed_by=trust_key(where),
    )
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            directory,
            dtype=DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which reports them, for us to refuse
            **({"device_map": device_map} if device_map else {}),
        )
    except Exception as error:  # transformers raises many kinds for missing, damaged or unknown files
        raise not_loadable(directory, error, f"{where}.model", trust_key(where)) from error
    finally:
        if had_progress_bar:
            transformers_logging.enable_progress_bar()
    check_after_loading(model, report, directory, f"{where}.model")
    model.eval().requires_grad_(False)
    if not device_map:
        model.to(device or this_device())
    for name, parameter in model.named_parameters():
        if parameter.dtype in DTYPES.values() and parameter.device.type != "meta":
            refuse_non_finite(parameter, f"{where}.model: {directory}: {name}")
    return model


def load_causal_lm(options: AnsweringOptions, device: torch.device | None = None, where: str = "model") -> Any:
    """The language model of a source or target; see load_model."""
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
    """Where a model takes its token ids: its embedding's device, which is not the head's where device_map spreads it.

    Weights that device_map keeps off every device are "meta"; accelerate then moves the input itself.
    """
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def refuse_unknown_ids(model: Any, largest: int, where: str) -> None:
    """Raises UserError where the largest id of a text is none of the model's. `where` is the model's recipe key (`sources.mpt`).

    By what a text holds, not by the tokenizer's size: a padding token that no text uses may lie beyond the embedding.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise UserError(
            f"{where}: its tokenizer gives id {largest}, but the model knows {known} ids: the tokenizer belongs to another model"
        )
