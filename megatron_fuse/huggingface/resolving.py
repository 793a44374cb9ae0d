"""Finds the directory of a model of the recipe on this machine. Nothing here uses the network."""

from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.gguf import refuse_gguf
from megatron_fuse.recipe import user_path
from megatron_fuse.text_safety import brief


def resolve_model(model: str, where: str) -> Path:
    """The directory of a model that is given as a directory or as a hub name in the local cache.

    where: the recipe key (`target.model`), for the error. Raises UserError if there is no such directory, or
    if it has no config.json.
    """
    directory = local_model(model, where)
    refuse_gguf(directory or user_path(model), where)
    if directory is None:
        raise UserError(
            f"{where}: {model!r} is not a directory and not a model in the local Hugging Face cache. Name a "
            "model directory."
        )
    if not (directory / "config.json").is_file():
        raise UserError(f"{where}: {directory} has no config.json. Name a Hugging Face model directory.")
    return directory


def local_model(model: str, where: str) -> Path | None:
    """A directory, or the snapshot of a hub name in the local cache; None if it is neither.

    where: the recipe key, for the error. Raises UserError for a name that no file system allows.
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


def trust_key(where: str) -> str:
    """The option that allows a model of the recipe to run its own code.

    where: the model's key (`sources.mpt`).
    """
    return f"{where}.trust_remote_code: true"
