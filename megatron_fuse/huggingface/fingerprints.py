"""What tells the weights of one model directory from those of another, without reading all of them."""

from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.model.weight_files import WeightFiles, shards_of
from megatron_fuse.storage import sha256_of_bytes
from megatron_fuse.storage.safetensors_header import read_safetensors_header
from megatron_fuse.storage.strict_json import file_size, read_small_file

WEIGHT_SUFFIXES = (".safetensors", ".bin")
_EDGE = 64 * 1024
_SAMPLE = 4 * 1024


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
