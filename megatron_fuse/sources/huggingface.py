"""Source models in process: finding, identifying and loading Hugging Face model directories. Nothing here uses the network."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.errors import UserError
from megatron_fuse.model.config_file import end_token_ids, read_model_config
from megatron_fuse.model.expected_weights import refuse_non_finite
from megatron_fuse.model.weight_files import DTYPES, WeightFiles, shards_of
from megatron_fuse.own_code import not_loadable
from megatron_fuse.recipe import TARGET, ModelOptions, user_path
from megatron_fuse.sources.gguf import refuse_gguf
from megatron_fuse.sources.loading_checks import check_after_loading, check_before_loading
from megatron_fuse.storage import sha256_of_bytes
from megatron_fuse.storage.safetensors_header import read_safetensors_header
from megatron_fuse.storage.strict_json import file_size, read_small_file
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization import load_tokenizer

WEIGHT_SUFFIXES = (".safetensors", ".bin")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # keys of a config
_EDGE = 64 * 1024
_SAMPLE = 4 * 1024


def this_device() -> torch.device:
    """This process's GPU under torchrun, the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def resolve_model(model: str, where: str) -> Path:
    """Directory of a model given as a directory or as a hub name that is already in the local cache.

    `where` is the recipe key (`target.model`), for the error. Raises UserError where there is no such directory or it has no config.json.
    """
    directory = local_model(model, where)
    refuse_gguf(directory or user_path(model), where)
    if directory is None:
        raise UserError(f"{where}: {model!r} is neither a directory nor a model in the local Hugging Face cache")
    if not (directory / "config.json").is_file():
        raise UserError(f"{where}: {directory} has no config.json: name a Hugging Face model directory")
    return directory


def local_model(model: str, where: str) -> Path | None:
    """A directory, or the snapshot of a hub name in the local cache; None if it is neither.

    Raises UserError for what no file system takes. `where` is the recipe key, for the error.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        directory = user_path(model)
    except ValueError as error:
        raise UserError(f"{where}: {error} (given: {brief(model, 80)!r})") from error
    if directory.is_dir():
        return directory
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def load_format(options: ModelOptions, where: str) -> ChatFormat:
    """Tokenizer and chat format of a model of the recipe; `where` is its key (`sources.mpt`), for errors."""
    directory = resolve_model(options.model, f"{where}.model")
    read_model_config(directory)  # before the tokenizer's library reads it, whose errors name no key
    tokenizer = load_tokenizer(directory, trust_remote_code=options.trust_remote_code, allowed_by=trust_key(where))
    return load_chat_format(
        tokenizer, options.chat_template, options.system, where, end_token_ids(directory), learns=where == TARGET
    )


def trust_key(where: str) -> str:
    """What allows a model of the recipe to run its own code; `where` is its key (`sources.mpt`)."""
    return f"{where}.trust_remote_code: true"


def model_fingerprint(model_dir: Path) -> str:
    """sha256 that identifies a model's configuration and weights without reading all of them (under a second for 7B).

    Covers config.json and, of every weight file, its name, size, safetensors header, first and last 64 KiB and the first 4 KiB
    of every tensor: merging an adapter into a few matrices leaves the edges of the file as they were. Python files are read
    whole: under trust_remote_code they decide the logits.
    """
    weights = weight_parts(model_dir)
    if not weights:
        if shards_of(model_dir):  # names the shard that is missing, or the file beside its index
            WeightFiles(model_dir).open_all()
        raise UserError(f"{model_dir}: has no weights (*.safetensors or *.bin)")
    parts = [read_small_file(model_dir / "config.json")]
    for path in sorted(model_dir.glob("*.py")):
        parts += [path.name.encode(), read_small_file(path)]
    return sha256_of_bytes(*parts, *weights)


def weight_parts(model_dir: Path) -> list[bytes]:
    """What tells the weights of a directory from others: name and samples of every file; none where there are no weights.

    Of shards those count that the index names, in whatever folder.
    """
    shards = shards_of(model_dir)
    files = [path for path in model_dir.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.suffix not in shards]
    named = [model_dir / name for names in shards.values() for name in names]
    parts: list[bytes] = []
    for path in sorted(files + [path for path in named if path.is_file()]):
        parts += [path.relative_to(model_dir).as_posix().encode(), *weight_samples(path)]
    return parts


def weight_samples(path: Path) -> list[bytes]:
    """Parts of a weight file that tell it from others. Raises UserError for one that is damaged where that is cheap to see."""
    size = file_size(path)
    header = read_safetensors_header(path) if path.suffix == ".safetensors" else None
    try:
        with path.open("rb") as file:

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            parts = [str(size).encode(), read(0, _EDGE), read(max(size - _EDGE, 0), _EDGE)]
            if header is None:
                return parts + [read(offset, _SAMPLE) for offset in range(0, size, max(size // 256, 1))]
            return [*parts, header.text, *(read(tensor.start, _SAMPLE) for tensor in header.tensors.values())]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def max_positions(config: Any) -> int | None:
    """Most tokens that a model can read, from its Hugging Face config; None where it states no limit."""
    config = config.get_text_config()
    return _positive(getattr(config, name, None) for name in _POSITIONS)


def longest_text(model: Any) -> int | None:
    """Most tokens that a loaded model can read; None where its config states no limit.

    RoBERTa and its kin count positions from beyond the padding token's id, and have as many fewer.
    """
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    first = max(
        (table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), default=0
    )
    limit = max_positions(model.config)
    return limit and limit - first


def declared_positions(model_dir: Path) -> int | None:
    """Most tokens that a model can read, as its config.json says; else None. For models that transformers need not know."""
    config = read_model_config(model_dir)
    return _positive(getattr(config, name) for name in _POSITIONS)


def declared_vocab_size(model_dir: Path) -> int | None:
    """Ids that a model knows, as its config.json says; else None."""
    return _positive([read_model_config(model_dir).vocab_size])


def _positive(values: Iterable[Any]) -> int | None:
    """The first that is a positive integer."""
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def load_model(auto_class: Any, options: ModelOptions, device: torch.device | None = None, where: str = "model") -> Any:
    """What `auto_class.from_pretrained` gives, in evaluation mode and without gradients.

    `device` defaults to this process's own; `options.device_map`, where set, places the model instead. `where` is the recipe key
    of the options (`sources.mpt`), for errors. Options without a dtype (the target's) load in fp32. Raises UserError for a model
    that cannot be loaded whole: transformers itself would fill in random weights.
    """
    directory = resolve_model(options.model, f"{where}.model")
    check_before_loading(
        auto_class,
        directory,
        f"{where}.model",
        trust_remote_code=options.trust_remote_code,
        allowed_by=trust_key(where),
    )
    device_map = getattr(options, "device_map", None)
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            directory,
            dtype=DTYPES[getattr(options, "dtype", "fp32")],
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
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


def load_causal_lm(options: ModelOptions, device: torch.device | None = None, where: str = "model") -> Any:
    """The language model of a source or target; see load_model."""
    return load_model(AutoModelForCausalLM, options, device, where)


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
