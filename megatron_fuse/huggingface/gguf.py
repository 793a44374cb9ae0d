"""Converts a GGUF file to a Hugging Face directory, dequantised by transformers, with the original tokenizer.

A GGUF file holds less than a model directory. It names the pattern that splits text before merging, but does
not contain the pattern. It stores the frequencies of scaled rotary positions in a place that transformers
does not read. The directory of the model that the file was made from has both.
"""

import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.bars import without_bars
from megatron_fuse.huggingface.loading_checks import check_after_loading
from megatron_fuse.model.carried_files import copy_beside_weights, write_config
from megatron_fuse.model.config_file import load_config
from megatron_fuse.model.expected_weights import refuse_non_finite
from megatron_fuse.model.weight_files import DTYPES
from megatron_fuse.storage.recorded_directory import directory_then_rename, sole_writer
from megatron_fuse.storage.strict_json import file_size, read_object
from megatron_fuse.text_safety import brief

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
_USER_DEFINED, _UNUSED = 4, 5  # of tokenizer.ggml.token_type
_COMPARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def refuse_gguf(model: Path, where: str) -> None:
    """Raises UserError, with the command that converts it, if `model` is a GGUF file or a directory with one.

    A directory that also has a config.json is accepted. where: the key or option that names the model, for
    the error.
    """
    is_file = model.suffix == SUFFIX and model.is_file()
    files = [model] if is_file else sorted(model.glob(f"*{SUFFIX}")) if model.is_dir() else []
    if not files or (model / "config.json").exists():
        return
    file, output = shlex.quote(str(files[0])), shlex.quote(str(files[0].with_suffix("")))
    raise UserError(
        f"{where}: {files[0]} is a GGUF file. Convert it once, and name the directory that this command "
        f"writes: megatron-fuse convert --from-gguf {file} --tokenizer ORIGINAL_MODEL --output {output}"
    )


def convert_gguf(file: Path, tokenizer: Path, output: Path, dtype: str = "fp32") -> None:
    """Writes a GGUF file's model as a new directory: safetensors without quantization_config, and tokenizer.

    tokenizer: the Hugging Face directory of the model that the file was made from. Its tokenizer files and
    chat template are copied. If the file has rotary scaling, the scaling of its config.json is used. dtype:
    of the written weights.

    Raises UserError for a file that transformers cannot read, for tokens or sizes that differ, if `output`
    exists, and without the package gguf.
    """
    if file.suffix != SUFFIX:
        raise UserError(f"--from-gguf: {file} is not a {SUFFIX} file")
    file_size(file)
    held = _held(file)
    _compare_tokens(_vocabulary(tokenizer), held, file, tokenizer)
    if held.rotary_scaling:  # read before the weights, so that an error comes early
        original = _scaled_config(tokenizer, file, held.rotary_scaling)
    model = _load(file, dtype)
    if held.rotary_scaling:
        _compare_sizes(model.config, original, file, tokenizer)
        model.config.rope_parameters = original.rope_parameters
    with sole_writer(output, "config.json"):
        if output.exists():
            raise UserError(f"{output} already exists. Remove it or choose another directory.")
        with directory_then_rename(output) as temporary, without_bars():
            model.save_pretrained(temporary)
            write_config(temporary, read_object(temporary / "config.json"), dtype)
            copy_beside_weights(tokenizer, temporary)
    logger.info(
        f"{output}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, dequantised, "
        f"in {dtype}"
    )


@contextmanager
def _read(what: str) -> Iterator[None]:
    """Turns any exception in the block into a UserError.

    transformers and gguf raise many types for damaged files.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} cannot be read: {brief(str(error))}") from error


@dataclass(frozen=True)
class _Held:
    """Content of a GGUF file beside the weights."""

    tokens: list[str]
    types: list[int]  # one per token, or none
    rotary_scaling: str | None  # the key or tensor that says that rotary positions are scaled


def _held(file: Path) -> _Held:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"--from-gguf needs the package gguf ({error}). Run pip install 'megatron-fuse[gguf]'."
        ) from error
    with _read(f"--from-gguf: {file}"):
        reader = GGUFReader(file)

        def value(name: str) -> Any:
            return reader.fields[name].contents() if name in reader.fields else None

        # The scaling of Llama 3.1 is a tensor, that of other models is in keys, and that of Phi-3 is in both.
        keys = [name for name in reader.fields if re.search(r"\.rope\.(scaling\.|scale_linear$)", name)]
        if any(name.endswith(".type") and value(name) == "none" for name in keys):
            keys = []
        tensors = [tensor.name for tensor in reader.tensors if re.match(r"rope_(freqs|factors)", tensor.name)]
        return _Held(
            value("tokenizer.ggml.tokens") or [],
            value("tokenizer.ggml.token_type") or [],
            next(iter(tensors + keys), None),
        )


def _vocabulary(tokenizer: Path) -> dict[int, str]:
    """id -> text of the tokens of a Hugging Face directory."""
    from transformers import AutoTokenizer

    with _read(f"--tokenizer: {tokenizer}"):
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)
    return {token: text for text, token in loaded.get_vocab().items()}


def _load(file: Path, dtype: str) -> Any:
    """The model of a GGUF file, dequantised. Raises UserError if weights are missing or not finite."""
    import transformers
    from transformers import AutoModelForCausalLM

    # Versions of transformers with GgufConfig leave the weights quantised by default; earlier versions always
    # dequantise.
    config = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": config(gguf_file=file.name, dequantize=True)} if config else {}
    with _read(f"--from-gguf: {file}"), without_bars():
        # A pair, which transformers' annotation leaves out.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            local_files_only=True,
            **plain,
            dtype=DTYPES[dtype],
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    check_after_loading(model, report, file, "--from-gguf")
    for name, parameter in model.named_parameters():
        refuse_non_finite(parameter.detach(), f"--from-gguf: {file}: {name}")
    # The weights are dequantised now. Without this, save_pretrained would still follow the quantisation of
    # the file.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _scaled_config(tokenizer: Path, file: Path, scaling: str) -> Any:
    """The config of the original's text model.

    Raises UserError if there is no config, or one without rotary scaling.
    """
    needed = (
        f"--tokenizer: {file} has scaled rotary positions ({scaling}). transformers does not read their "
        f"parameters from this file, and {tokenizer}"
    )
    if not (tokenizer / "config.json").is_file():
        raise UserError(
            f"{needed} has no config.json. Copy the config.json of the original model into that directory."
        )
    config = load_config(tokenizer).get_text_config()
    rope = config.rope_parameters or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each kind of layer
    if all(part.get("rope_type", "default") == "default" for part in parts):
        raise UserError(
            f"{needed}/config.json has no rope_scaling. Name the directory of the model that the file was "
            "made from."
        )
    return config


def _compare_sizes(ours: Any, original: Any, file: Path, tokenizer: Path) -> None:
    """Raises UserError if a file's config and the original's, which gives the rotary parameters, disagree."""

    def sizes(config: Any) -> dict[str, Any]:
        theta = (config.rope_parameters or {}).get("rope_theta")
        return {name: getattr(config, name, None) for name in _COMPARED} | {"rope_theta": theta}

    theirs = sizes(original)
    for name, size in sizes(ours).items():
        if size != theirs[name]:
            raise UserError(
                f"--tokenizer: {name} is {theirs[name]} in {tokenizer}/config.json, but {size} in {file}. "
                "Name the directory of the model that the file was made from."
            )


def _compare_tokens(tokenizer: dict[int, str], held: _Held, file: Path, where: Path) -> None:
    """Raises UserError for an id that is another token in the file, or that only one of the two has.

    tokenizer: id -> text. Tokens that only the file has are allowed if they are padding or marked as unused.
    """
    fix = "Name the directory of the model that the file was made from."
    types = dict(enumerate(held.types))
    for token, theirs in enumerate(held.tokens):
        ours, kind, shown = tokenizer.get(token), types.get(token), brief(repr(theirs), 60)
        if ours is None:
            if kind == _UNUSED or re.fullmatch(r"\[PAD\d+\]", theirs):
                continue
            raise UserError(
                f"--tokenizer: {where} has no token for id {token}, which is {shown} in {file}. {fix}"
            )
        if kind == _USER_DEFINED:  # llama.cpp writes these tokens with blanks in the place of U+2581
            same = ours.replace("\u2581", " ") == theirs.replace("\u2581", " ")
        else:
            same = ours == theirs
        if not same:
            raise UserError(
                f"--tokenizer: id {token} is {brief(repr(ours), 60)} in {where}, but {shown} in {file}. {fix}"
            )
    count = max(tokenizer, default=-1) + 1
    if count > len(held.tokens):
        raise UserError(f"--tokenizer: {where} has {count} tokens, but {file} has {len(held.tokens)}. {fix}")
