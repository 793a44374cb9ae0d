"""A GGUF file as a Hugging Face model directory, once and for all roles: dequantised by transformers, with the original tokenizer.

A GGUF file that holds a byte-level BPE names the pattern by which text is split before merging, and does not have it: the tokens are
right and texts may still be cut otherwise. So such a file needs the tokenizer of the model that it was made from.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.model.carried_files import copy_beside_weights
from megatron_fuse.model.expected_weights import refuse_non_finite
from megatron_fuse.model.weight_files import DTYPES
from megatron_fuse.sources.loading_checks import check_after_loading
from megatron_fuse.storage.recorded_directory import directory_then_rename, sole_writer
from megatron_fuse.storage.strict_json import file_size
from megatron_fuse.text_safety import brief, say

SUFFIX = ".gguf"
_WHOLE = "llama"  # tokenizer.ggml.model of SentencePiece, which a file holds with all that decides


def refuse_gguf(model: Path, where: str) -> None:
    """Raises UserError, with the command that converts it, for a GGUF file or a directory that holds one and no config.json."""
    files = [model] if model.suffix == SUFFIX else sorted(model.glob(f"*{SUFFIX}")) if model.is_dir() else []
    if not files or (model / "config.json").exists():
        return
    raise UserError(
        f"{where}: {files[0]} is a GGUF file: convert it once, and name the directory that comes of it: "
        f"python tools/convert_checkpoint.py --from-gguf {files[0]} --tokenizer ORIGINAL_MODEL --output {files[0].with_suffix('')}"
    )


def convert_gguf(
    file: Path, tokenizer: Path | None, output: Path, dtype: str = "fp32", progress: Callable[[str], None] = say
) -> None:
    """Writes the model of a GGUF file as safetensors, without quantization_config, beside its tokenizer, into a new directory.

    tokenizer: a Hugging Face directory whose tokenizer files and chat template are taken; its tokens have to be the file's. None: the
    file's own, for SentencePiece alone. Raises UserError for a file that transformers cannot read, tokens that differ, and without
    the package gguf.
    """
    if file.suffix != SUFFIX:
        raise UserError(f"--from-gguf: {file} is no {SUFFIX} file")
    file_size(file)
    fields = _fields(file)
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens") or []
    if tokenizer is None and kind != _WHOLE:
        raise UserError(
            f"--from-gguf: {file} has a tokenizer of kind {kind!r}, whose file does not say how texts are split before merging: name the "
            "directory of the model that it was made from with --tokenizer"
        )
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Versions that can leave weights packed do so unless they are told not to; those before cannot.
    config = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": config(gguf_file=file.name, dequantize=True)} if config else {}
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    with _read(f"--tokenizer: {tokenizer}" if tokenizer else f"--from-gguf: {file}"):
        named = {"pretrained_model_name_or_path": tokenizer, "local_files_only": True} if tokenizer else place
        found = AutoTokenizer.from_pretrained(**named, trust_remote_code=False)
    _compare_tokens(found, tokens, file, tokenizer)
    with _read(f"--from-gguf: {file}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            **place, **plain, dtype=DTYPES[dtype], trust_remote_code=False, output_loading_info=True
        )
    check_after_loading(model, report, file, "--from-gguf")
    for name, parameter in model.named_parameters():
        refuse_non_finite(parameter.detach(), f"--from-gguf: {file}: {name}")
    # The weights are plain now, but save_pretrained goes by what the file had.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with sole_writer(output, "config.json"):
        if output.exists():
            raise UserError(f"{output} already exists: remove it or choose another directory")
        with directory_then_rename(output) as temporary:
            model.save_pretrained(temporary)
            if tokenizer is None:
                found.save_pretrained(temporary)
            else:
                copy_beside_weights(tokenizer, temporary)
    progress(
        f"{output}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, dequantised, in {dtype}"
    )


@contextmanager
def _read(what: str) -> Iterator[None]:
    """Turns what transformers and gguf raise for damaged or unknown files, which are many kinds, into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} cannot be read: {brief(str(error))}") from error


def _fields(file: Path) -> dict[str, Any]:
    """What the file says of its tokenizer."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"--from-gguf needs the package gguf ({error}): pip install 'megatron-fuse[gguf]'") from error
    with _read(f"--from-gguf: {file}"):
        reader = GGUFReader(file)
        names = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
        return {name: reader.fields[name].contents() for name in names if name in reader.fields}


def _compare_tokens(tokenizer: Any, tokens: list[str], file: Path, where: Path | None) -> None:
    """Raises UserError for an id of the tokenizer that is another token in the file. Further tokens of the file are padding."""
    for token in range(min(len(tokenizer), len(tokens))):
        ours = tokenizer.convert_ids_to_tokens(token)
        if ours is not None and ours != tokens[token]:
            raise UserError(
                f"--tokenizer: id {token} is {brief(repr(ours), 60)} in {where or 'what transformers makes of it'}, but "
                f"{brief(repr(tokens[token]), 60)} in {file}: name the directory of the model that it was made from"
            )
    if len(tokenizer) > len(tokens):
        raise UserError(
            f"--tokenizer: {where or 'what transformers makes of it'} has {len(tokenizer)} tokens, {file} {len(tokens)}: name the "
            "directory of the model that it was made from"
        )
