"""The text's shards for the build of every source: documents with the bytes that their labels cover.

    FUSION/text/shard-00000.spans.safetensors    starts, ends int32 [r], flags uint8 [r]: one row per label,
                                                 byte offsets within
                                                 the example's supervised bytes; lossy uint8 [n]: one per
                                                 example

The stage of the text tokenizes it once; the sources read the result. Rows and fields are those of TokenSpans
and Documents.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from megatron_fuse import ragged
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.encoding import Documents
from megatron_fuse.fusion_data.layout import BUILT_BY
from megatron_fuse.fusion_data.streams import Stream
from megatron_fuse.storage import Artifact, write_safetensors
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization.spans import TokenSpans

SUFFIX = ".spans.safetensors"
_DTYPES = {"starts": np.int32, "ends": np.int32, "flags": np.uint8, "lossy": np.uint8}


def write_spans(prefix: Path, documents: Documents) -> None:
    """Writes PREFIX.spans.safetensors."""
    spans = TokenSpans.join(documents.spans, [0] * len(documents.spans))
    values = {"starts": spans.starts, "ends": spans.ends, "flags": spans.flags, "lossy": documents.lossy}
    write_safetensors(
        Path(f"{prefix}{SUFFIX}"), {name: values[name].astype(dtype) for name, dtype in _DTYPES.items()}
    )


def read_spans(path: Path, *, labels: int, examples: int) -> dict[str, np.ndarray]:
    """The arrays of a file of spans.

    Raises UserError if it cannot be read, or has other numbers of labels and examples.
    """
    try:
        arrays = load_file(path)
        for name, dtype in _DTYPES.items():
            wanted = (examples if name == "lossy" else labels,)
            if arrays[name].shape != wanted or arrays[name].dtype != dtype:
                form = f"{arrays[name].dtype} {arrays[name].shape}"
                raise ValueError(f"{name} is {form}, not {np.dtype(dtype)} {wanted}")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: the spans cannot be read ({brief(str(error))}). Remove the file and run {BUILT_BY} "
            "again."
        ) from error
    return arrays


def read_text_shard(text: Artifact, index: int) -> Documents:
    """One shard of the text. Compares its files with their checksums. Raises UserError for damage."""
    prefix = text.directory / f"shard-{index:05d}"
    for field in ("tokens", "supervised"):
        for suffix in (".bin", ".idx"):
            text.checked(Path(f"{prefix}.{field}{suffix}"))
    tokens, supervised = (Stream([f"{prefix}.{field}"]) for field in ("tokens", "supervised"))
    ids = [tokens[example].astype(np.int32) for example in range(len(tokens))]
    marks = [supervised[example] for example in range(len(tokens))]
    labels = [number[mark != 0] for number, mark in zip(ids, marks, strict=True)]
    path = text.checked(Path(f"{prefix}{SUFFIX}"))
    arrays = read_spans(path, labels=sum(map(len, labels)), examples=len(ids))
    counts = [len(each) for each in labels]
    starts, ends, flags = (ragged.split(arrays[name], counts) for name in ("starts", "ends", "flags"))
    spans = [
        TokenSpans(label, start.astype(np.int64), end.astype(np.int64), flag)
        for label, start, end, flag in zip(labels, starts, ends, flags, strict=True)
    ]
    return Documents(ids, marks, spans, arrays["lossy"].astype(bool))
