"""The fused model of a recipe as a Hugging Face directory, made from its best or latest checkpoint.

    export/fusion.json    the checkpoint, its metadata, the dtype, and size and checksum of every file of the
                          export

If an export of the same checkpoint exists and its files are unchanged, nothing happens. A missing file is
made again. A file that was changed, or that the export did not write, is never removed: if it is in the way,
the error names it.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.carried_files import add_end, missing_end
from megatron_fuse.model.config_file import read_model_config
from megatron_fuse.model.expected_weights import hugging_face_shapes
from megatron_fuse.model.hugging_face_files import SHARD_BYTES, new_model_directory, write_hugging_face_files
from megatron_fuse.model.weight_files import DTYPES, WeightFiles, common_dtype
from megatron_fuse.recipe import Recipe
from megatron_fuse.storage import sha256_of_json
from megatron_fuse.storage.checksums import record_of_file
from megatron_fuse.storage.recorded_directory import directory_then_rename, find, record_files, sole_writer
from megatron_fuse.target import target_directory
from megatron_fuse.training.checkpoint_content import METADATA
from megatron_fuse.training.checkpoint_files import BEST, LATEST
from megatron_fuse.training.checkpoint_integrity import CHECKSUMS
from megatron_fuse.training.checkpoint_metadata import (
    iteration_directory,
    named_checkpoint,
    named_iteration,
    read_metadata,
)
from megatron_fuse.training.directories import checkpoint_directory, export_directory
from megatron_fuse.training.stored_parameters import stored_parameters

logger = logging.getLogger(__name__)

RECORD = "fusion.json"


def export_fused_model(recipe: Recipe) -> tuple[Path, Path]:
    """Exports the recipe's best (or latest) checkpoint. Returns the model directory and the checkpoint.

    The export's generation_config.json ends answers at the stop token of the training too. If that token had
    to be added, a line says so. An export of an older checkpoint is replaced; it keeps its
    name until the new export is complete. Raises UserError if there
    is no checkpoint, if something else is at the place of the export, or if the export cannot be written.
    """
    directory, verify = checkpoint_directory(recipe), recipe.training.verify
    wanted = BEST if recipe.export.checkpoint == "best" else LATEST
    # Without a validation split there is no best checkpoint.
    checkpoint = named_checkpoint(directory, wanted) or named_checkpoint(directory)
    if checkpoint is None:
        raise UserError(f"{directory} holds no checkpoint. Run python -m megatron_fuse.pretrain first.")
    reference, output = target_directory(recipe), export_directory(recipe)
    chat = load_format(recipe.target, "target")
    template = chat.template if recipe.target.chat_template is not None else None
    # The files of a base model end an answer only at its EOS token, which a chat model never writes.
    end = chat.stop_id if missing_end(reference, chat.stop_id) else None
    origin = _origin(checkpoint, recipe.export.dtype, template, end, verify=verify)
    place = output.resolve()  # a symbolic link stays, the directory behind it is replaced
    with sole_writer(place, RECORD):
        existing = find(place, RECORD, "export.path", verify=verify)
        if existing and existing.whole and sha256_of_json(existing.origin) == sha256_of_json(origin):
            return output, checkpoint
        if existing:
            existing.refuse_changes("export.path")
        with directory_then_rename(place, existing) as temporary:
            _write_parameters(checkpoint, reference, temporary, recipe.export.dtype, verify=verify)
            if template is not None:
                (temporary / "chat_template.jinja").write_text(template, encoding="utf-8")
            if end is not None:
                add_end(temporary, end)
                logger.info(
                    f"generation_config.json: answers end at {chat.tokenizer.token_text(end)!r} ({end}) as "
                    "well"
                )
            record_files(temporary, RECORD, origin)
    return output, checkpoint


def dtype_of_reference(reference: Path) -> str:
    """fp32, bf16 or fp16: the dtype of the weights in a Hugging Face directory,
    else that of its config, else fp32."""
    try:
        weights = WeightFiles(reference)
        dtype_name = common_dtype(
            weights.dtype(name) for name in hugging_face_shapes(read_architecture(reference))
        )
    except UserError:  # a directory without weights: its config is enough
        stated = read_model_config(reference)
        dtype_name = next(
            (
                name
                for name, dtype in DTYPES.items()
                if str(dtype) == f"torch.{stated.dtype or stated.torch_dtype}"
            ),
            "",
        )
    return dtype_name if dtype_name in DTYPES else "fp32"


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that a user names: itself, or a directory whose latest checkpoint is taken.

    It may be of another program that writes Megatron's format. Raises UserError if there is none.
    """
    if (path / METADATA).exists() or (path / "facts.json").exists():
        return path
    iteration = named_iteration(path, LATEST)
    if iteration is None:
        raise UserError(
            f"{path}: not a checkpoint, because it has no {LATEST} and no {METADATA}. Name a "
            "checkpoint directory."
        )
    checkpoint = iteration_directory(path, iteration)
    return checkpoint if (checkpoint / METADATA).exists() else named_checkpoint(path) or checkpoint


def export_checkpoint(
    checkpoint: Path,
    reference: Path,
    output: Path,
    dtype: str | None = None,
    *,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a checkpoint of any layout as a Hugging Face model directory, in one process, without Megatron
    or a GPU. Returns the dtype. The memory is that of one file of the output.

    reference: Hugging Face directory that gives config, tokenizer and chat template; its weights are not
        read.
    dtype: fp32, bf16 or fp16; None: the reference's.
    verify: compare the checksums of the checkpoint's files.
    shard_bytes: the most bytes of a file of weights.

    output must not exist.
    """
    dtype = dtype or dtype_of_reference(reference)
    with new_model_directory(output) as temporary:
        _write_parameters(checkpoint, reference, temporary, dtype, verify=verify, shard_bytes=shard_bytes)
    return dtype


def _write_parameters(
    checkpoint: Path,
    reference: Path,
    directory: Path,
    dtype: str,
    *,
    verify: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the model of a checkpoint into an empty directory. Raises UserError for any damage of it."""
    with stored_parameters(checkpoint, read_architecture(reference), verify=verify) as parameters:
        write_hugging_face_files(parameters, reference, directory, dtype, shard_bytes)


def _origin(
    checkpoint: Path, dtype: str, template: str | None, end: int | None, *, verify: bool
) -> dict[str, Any]:
    """All inputs of an export's files.

    Two checkpoints may have the same metadata, but not the same checksums.
    """
    checksums = checkpoint / CHECKSUMS
    return {
        "checkpoint": str(checkpoint),
        "checksums": record_of_file(checksums).xxh3_128 if checksums.is_file() else None,
        "facts": asdict(read_metadata(checkpoint, verify=verify)),
        "dtype": dtype,
        "chat_template": template,
        **({"end": end} if end is not None else {}),
    }
