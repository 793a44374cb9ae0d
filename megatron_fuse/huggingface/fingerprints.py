"""Fingerprints of model directories: hashes that identify the weights without reading all of them."""

from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.model.weight_files import WeightFiles, shards_of
from megatron_fuse.storage import sha256_of_parts
from megatron_fuse.storage.safetensors_header import read_safetensors_header
from megatron_fuse.storage.strict_json import file_size, read_small_file

WEIGHT_SUFFIXES = (".safetensors", ".bin")
_EDGE = 64 * 1024  # bytes at the begin and at the end of a file
_SAMPLE = 4 * 1024  # bytes at the begin of every tensor


def model_fingerprint(model_dir: Path) -> str:
    """sha256 that identifies a model's configuration and weights without reading all of them (under a second
    for 7B).

    Covers config.json and, for every weight file, the name, size, safetensors header, first and last 64 KiB,
    and the first 4 KiB of every tensor. The tensors are sampled because an adapter merged into a few matrices
    does not change the edges of the file. Python files are read whole, because under trust_remote_code they
    decide the logits.

    Raises UserError if there are no weights, or if a file is missing or damaged.
    """
    weights = weight_parts(model_dir)
    if not weights:
        if shards_of(model_dir):  # an index without its shards: open_all names the shard that is missing
            WeightFiles(model_dir).open_all()
        raise UserError(
            f"{model_dir} has no weights (*.safetensors or *.bin). Name a directory with weights, or fetch "
            "the model again."
        )
    parts = [read_small_file(model_dir / "config.json")]
    for path in sorted(model_dir.glob("*.py")):
        parts += [path.name.encode(), read_small_file(path)]
    return sha256_of_parts(*parts, *weights)


def weight_parts(model_dir: Path) -> list[bytes]:
    """Name and samples of every weight file of a directory; empty if there are no weights.

    If there is an index, only the shards that it names count, in whatever folder they are.
    """
    shards = shards_of(model_dir)
    files = [
        path for path in model_dir.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.suffix not in shards
    ]
    named = [model_dir / name for names in shards.values() for name in names]
    parts: list[bytes] = []
    for path in sorted(files + [path for path in named if path.is_file()]):
        parts += [path.relative_to(model_dir).as_posix().encode(), *weight_samples(path)]
    return parts


def weight_samples(path: Path) -> list[bytes]:
    """Parts of a weight file that identify it: its size, its edges, its header and samples of its tensors.

    A file other than safetensors has no header: there 4 KiB are read at about 256 places. Raises UserError if
    the file cannot be read, or if its safetensors header is damaged.
    """
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
