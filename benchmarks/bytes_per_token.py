r"""Bytes on disk per supervised token and source, beside the forms in which others keep the same rows.

    python benchmarks/bytes_per_token.py --target-tokenizer T --source-tokenizer S \
        --large-target-tokenizer L --instructions FILE.jsonl --csv runs/bytes_per_token.csv

Counted is everything under WORKDIR/fusion of the training mode with one source: text, rows, indices,
manifests, vocabulary map, selection. The rows are synthetic (synthetic_captures.py), so many of 10 entries
kept on average; texts and tokenizers are real, and the data goes through the real build, where rows without a
counterpart are skipped and entries meet on one token: what is left of them is a figure of its own. Baselines,
of the same rows after the build:

    Arrow lists    list<int32> and list<float32> columns of an Arrow file, a list per example and row, as
                   FuseLLM keeps them,
                   with the tokens as list<int32>
    raw k = 10     10 int32 ids and 10 float16 log-probabilities per row whether used or not, and int32 tokens
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from synthetic_captures import MEAN_KEPT, synthetic_run
from table import Measurement, run

from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.stages import Context

NAMES = {
    "full_vocabulary": "default rule",
    "hugging_face": "Hugging Face's order",
    "none": "no truncation",
}
WANTED = {"full_vocabulary": "<= 33", "hugging_face": "<= 48"}
WANTED_LARGE = "<= 64"  # ids of 4 bytes
SOURCE = "source"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-tokenizer", type=Path, required=True, help="tokenizer with at most 65536 ids"
    )
    parser.add_argument("--large-target-tokenizer", type=Path, help="tokenizer with more than 65536 ids")
    parser.add_argument("--source-tokenizer", type=Path, required=True)
    parser.add_argument(
        "--instructions",
        type=Path,
        required=True,
        help="instruction file (JSONL in any form that a recipe takes)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=1500,
        help="number of examples; with few of them the vocabulary map is a large part of the bytes",
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    found = []
    for rule in MEAN_KEPT:
        found += _measure(options, options.target_tokenizer, rule, NAMES[rule], WANTED.get(rule, ""))
    if options.large_target_tokenizer:
        for rule in ("full_vocabulary", "hugging_face"):
            name = f"{NAMES[rule]}, large vocabulary"
            found += _measure(options, options.large_target_tokenizer, rule, name, WANTED_LARGE)
    return found


def _measure(
    options: argparse.Namespace, target_tokenizer: Path, rule: str, name: str, wanted: str
) -> list[Measurement]:
    with tempfile.TemporaryDirectory() as directory:
        sources = {SOURCE: options.source_tokenizer}
        recipe = synthetic_run(
            Path(directory),
            target_tokenizer,
            sources,
            options.instructions,
            examples=options.examples,
            rule=rule,
        )
        build_fusion_data(Context(recipe))
        files = [path for path in fusion_directory(recipe).rglob("*") if path.is_file()]
        dataset = FusionDataset(recipe)
        labels = int(dataset.supervised_tokens("training").sum())
        ours = sum(path.stat().st_size for path in files) / labels
        entries = sum(
            len(dataset.document("training", i, SOURCE).teacher_ids) for i in range(len(dataset.example_ids))
        )
        baselines = {"Arrow lists": _arrow_bytes, "raw k = 10": _raw_bytes}
        title = f"fusion data, {name} ({MEAN_KEPT[rule]:g} of 10 kept, synthetic)"
        return [
            Measurement(title, ours, "B/token", baseline, count(dataset, Path(directory)) / labels, wanted)
            for baseline, count in baselines.items()
        ] + [Measurement(f"  entries left of them, {name}", entries / labels, "per token")]


def _arrow_bytes(dataset: FusionDataset, directory: Path) -> int:
    """Size of an Arrow file that holds the same conversations and rows as lists of lists."""
    import pyarrow

    path = directory / "rows.arrow"
    lists = {"int": pyarrow.list_(pyarrow.int32()), "float": pyarrow.list_(pyarrow.float32())}
    schema = pyarrow.schema(
        {
            "tokens": lists["int"],
            "supervised": lists["int"],
            "entry_ids": pyarrow.list_(lists["int"]),
            "entry_logprobs": pyarrow.list_(lists["float"]),
        }
    )
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        for first in range(0, len(dataset.example_ids), 512):
            documents = [
                dataset.document("training", number, SOURCE)
                for number in range(first, min(first + 512, len(dataset.example_ids)))
            ]
            bounds = [np.cumsum(document.counts, dtype=np.int64)[:-1] for document in documents]
            batch = {
                "tokens": [document.tokens.astype(np.int32) for document in documents],
                "supervised": [document.supervised.astype(np.int32) for document in documents],
                "entry_ids": [
                    np.split(d.teacher_ids.astype(np.int32), at)
                    for d, at in zip(documents, bounds, strict=True)
                ],
                "entry_logprobs": [
                    np.split(d.teacher_logprobs.astype(np.float32), at)
                    for d, at in zip(documents, bounds, strict=True)
                ],
            }
            writer.write_batch(pyarrow.record_batch(batch, schema=schema))
    return path.stat().st_size


def _raw_bytes(dataset: FusionDataset, directory: Path) -> int:
    """Size of fixed rows of 10 ids and log-probabilities, and of the tokens with one byte each that marks
    the labels.
    """
    tokens = int(dataset.lengths("training").sum())
    labels = int(dataset.supervised_tokens("training").sum())
    ids, logprobs = np.zeros((labels, 10), np.int32), np.zeros((labels, 10), np.float16)
    return ids.nbytes + logprobs.nbytes + tokens * (np.dtype(np.int32).itemsize + 1)


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
