"""Documents of random ids with teacher's rows, written and read in the form on disk.

For benchmarks of what comes after alignment.
"""

from pathlib import Path

import numpy as np

from megatron_fuse.fusion_data.documents import ROW_FIELDS, TEXT_FIELDS, DocumentStreams
from megatron_fuse.fusion_data.streams import Stream, write_stream

LABELS = 0.75  # of the tokens
SHARD = 64  # documents


def write_documents(
    directory: Path, positions: np.ndarray, draw: np.random.Generator, vocabulary: int, entries: int = 10
) -> DocumentStreams:
    """Documents that take so many positions each, with rows of so many entries each, of one source."""
    id_type = np.uint16 if vocabulary <= 1 << 16 else np.int32
    directory.mkdir()
    prefixes = []
    for first in range(0, len(positions), SHARD):
        prefixes.append(directory / f"shard-{first // SHARD:05d}")
        tokens = positions[first : first + SHARD] + 1
        labels = np.maximum((LABELS * tokens).astype(np.int64), 1)
        rows = int(labels.sum())
        of_document = np.repeat(np.arange(len(tokens)), tokens)
        place = np.arange(tokens.sum()) - (np.cumsum(tokens) - tokens)[of_document]
        logprobs = np.log(draw.dirichlet(np.ones(entries), rows) * 0.9).astype(np.float16)
        streams = {
            "tokens": (draw.integers(0, vocabulary, tokens.sum()).astype(id_type), tokens),
            "supervised": ((place >= (tokens - labels)[of_document]).astype(np.uint8), tokens),
            "counts": (np.full(rows, entries, np.uint8), labels),
            "match": (np.ones(rows, np.uint8), labels),
            "entry_ids": (draw.integers(0, vocabulary, rows * entries).astype(id_type), labels * entries),
            "entry_logprobs": (logprobs.reshape(-1).view(np.uint16), labels * entries),
        }
        for field, (values, lengths) in streams.items():
            write_stream(f"{prefixes[-1]}.{field}", values, lengths)
    text, rows = (
        {field: Stream([f"{p}.{field}" for p in prefixes]) for field in of}
        for of in (TEXT_FIELDS, ROW_FIELDS)
    )
    return DocumentStreams(directory, text, rows, examples=len(positions), entries_per_row=entries + 1)
