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
from megatron_fuse.model.carried_files import add_end, missing_end
from megatron_fuse.model.conversion import write_hugging_face_model
from megatron_fuse.recipe import Recipe
from megatron_fuse.storage import sha256_of_json
from megatron_fuse.storage.checksums import record_of_file
from megatron_fuse.storage.recorded_directory import directory_then_rename, find, record_files, sole_writer
from megatron_fuse.target import checkpoint_directory, export_directory, target_directory
from megatron_fuse.training.checkpoint_files import BEST, LATEST
from megatron_fuse.training.checkpoint_integrity import CHECKSUMS
from megatron_fuse.training.checkpoint_metadata import named_checkpoint, read_metadata
from megatron_fuse.training.target import load_whole_model

logger = logging.getLogger(__name__)

RECORD = "fusion.json"


def export_fused_model(recipe: Recipe) -> tuple[Path, Path]:
    """Exports the recipe's best (or latest) checkpoint. Returns the model directory and the checkpoint.

    The export's generation_config.json ends answers at the stop token of the training too. If that token had
    to be added, a line says so. An export of an older checkpoint is replaced; it keeps its
    name until the new export is complete. Needs a runtime started with one process. Raises UserError if there
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
        model = load_whole_model(checkpoint, reference, verify=verify)
        with directory_then_rename(place, existing) as temporary:
            write_hugging_face_model(model, reference, temporary, recipe.export.dtype)
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
