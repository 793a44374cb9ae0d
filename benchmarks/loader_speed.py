"""What reading and collating fusion data costs, beside dense targets and beside the training step that it
feeds.

    python benchmarks/loader_speed.py --csv runs/loader_speed.csv

The documents are synthetic, of random ids, written and read in the form on disk: `long`, all of --seq-length
tokens, and `mixed`, of log-normal lengths with a median of 400. Three quarters of the tokens are labels, each
with a row of 10 entries; vocabulary 32000. A micro-batch is one sequence. Files are in the page cache; times
are the best of --repeats over all documents in random order, after a round that does not count. Checksums are
compared once per build and machine, by threads beside the first steps: a run of E epochs over S sources pays
S times the ratio to a step, over E. Baselines, of the same run:

    dense targets    one long document's rows, already read into Python lists, spread over a [tokens,
                     vocabulary] bf16 tensor
                     token by token, as FuseLLM's collator does; reading them is not counted
    training step    forward pass, fusion loss and backward pass of a Llama of 50 M parameters over one of
                     these micro-batches
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fuse_kernels import sparse_kl_cross_entropy
from synthetic_documents import write_documents
from table import Measurement, run
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_fuse.dataset.collation import Inputs, Targets, make_targets, packed_inputs, padded_inputs
from megatron_fuse.dataset.packing import pack
from megatron_fuse.fusion_data.documents import Document, DocumentStreams
from megatron_fuse.fusion_data.streams import Stream, write_stream
from megatron_fuse.storage import sha256_of_file

VOCABULARY = 32000
ENTRIES_PER_ROW = 11  # the most that a row may have

Batch = tuple[Inputs, Targets]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--shards", type=int, default=1000, help="number of shards of the stream whose opening is timed"
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    draw = np.random.default_rng(7)
    positions = options.seq_length
    mixed = np.clip(draw.lognormal(np.log(400), 0.8, options.documents), 32, positions).astype(np.int64)
    with tempfile.TemporaryDirectory() as directory:
        long_documents = write_documents(
            Path(directory) / "long", np.full(options.documents, positions), draw, VOCABULARY
        )
        mixed_documents = write_documents(Path(directory) / "mixed", mixed, draw, VOCABULARY)
        alone = [[number] for number in draw.permutation(options.documents).tolist()]
        packed = pack(mixed, positions)
        row_lists = _row_lists(long_documents[0])
        step = _training_step(*_padded(long_documents, alone[0], positions))
        baselines = {
            "dense targets": len(row_lists[0]) / _best(lambda: _dense_targets(*row_lists, positions), 2),
            "training step": 1e3 * _best(step, 1),
        }
        return [
            *_checksums(Path(directory) / "long", options, step, baselines["training step"]),
            *_speeds("long, padded", _padded, long_documents, alone, options, baselines),
            *_speeds("mixed, packed", _packed, mixed_documents, packed, options, baselines),
            _fill(mixed, len(packed), positions),
            _opening(Path(directory) / "many", options.shards, options.repeats),
        ]


def _checksums(
    directory: Path, options: argparse.Namespace, step: Callable[[], None], alone: float
) -> list[Measurement]:
    """What a run pays once per build and machine (dataset/checksums.py), beside the steps that read the
    documents once.
    """
    files = sorted(directory.iterdir())
    size = sum(path.stat().st_size for path in files)
    seconds = _best(lambda: [sha256_of_file(path) for path in files], options.repeats)
    stopped = threading.Event()

    def verify_on_and_on() -> None:
        while not stopped.is_set():
            for path in files:
                sha256_of_file(path)

    beside = threading.Thread(target=verify_on_and_on)
    beside.start()
    slowed = 1e3 * _best(step, 3)
    stopped.set()
    beside.join()
    per_document = {"baseline_name": "training step", "baseline": alone}
    return [
        Measurement("checksums: one thread", size / seconds / 1e6, "MB/s"),
        Measurement(
            "checksums: of a long document and one source's rows",
            1e3 * seconds / options.documents,
            "ms",
            **per_document,
            wanted="ratio <= 0.02",
        ),
        Measurement("checksums: a training step beside a thread of them", slowed, "ms", **per_document),
    ]


def _speeds(
    name: str,
    collate: Callable[[DocumentStreams, list[int], int], Batch],
    documents: DocumentStreams,
    batches: list[list[int]],
    options: argparse.Namespace,
    baselines: dict[str, float],
) -> list[Measurement]:
    def read() -> None:
        for batch in batches:
            for number in batch:
                documents[number]

    def read_and_collate() -> None:
        for batch in batches:
            collate(documents, batch, options.seq_length)

    reading, whole = (_best(run, options.repeats) for run in (read, read_and_collate))
    rows = int(documents.supervised_tokens.sum())
    against = {key: {"baseline_name": key, "baseline": value} for key, value in baselines.items()}
    return [
        Measurement(f"{name}: reading a document", 1e6 * reading / len(documents), "us"),
        Measurement(f"{name}: documents", len(documents) / whole, "samples/s"),
        Measurement(f"{name}: teacher rows", rows / whole, "rows/s", **against["dense targets"]),
        Measurement(
            f"{name}: a micro-batch",
            1e3 * whole / len(batches),
            "ms",
            **against["training step"],
            wanted="ratio <= 0.01",
        ),
    ]


def _fill(lengths: np.ndarray, sequences: int, positions: int) -> Measurement:
    packed, padded = (100 * lengths.sum() / (of * positions) for of in (sequences, len(lengths)))
    return Measurement("mixed, packed: positions with a token", packed, "%", "padded to --seq-length", padded)


def _padded(streams: DocumentStreams, batch: list[int], positions: int) -> Batch:
    documents = [streams[number] for number in batch]
    return _with_targets(documents, padded_inputs(documents, len(documents), positions))


def _packed(streams: DocumentStreams, batch: list[int], positions: int) -> Batch:
    documents = [streams[number] for number in batch]
    return _with_targets(documents, packed_inputs(documents, positions))


def _with_targets(documents: list[Document], inputs: Inputs) -> Batch:
    return inputs, make_targets(documents, [(1e-3, 5e-4)] * len(documents), inputs, ENTRIES_PER_ROW)


def _row_lists(document: Document) -> tuple[list[int], list[list[int]], list[list[float]]]:
    """Positions, ids and log-probabilities of a document's rows, as lists of lists."""
    ends = np.cumsum(document.counts, dtype=np.int64)[:-1]
    places = (np.flatnonzero(document.supervised) - 1).tolist()
    split = (np.split(field, ends) for field in (document.teacher_ids, document.teacher_logprobs))
    ids, logprobs = ([row.tolist() for row in field] for field in split)
    return places, ids, logprobs


def _dense_targets(
    places: list[int], ids: list[list[int]], logprobs: list[list[float]], positions: int
) -> torch.Tensor:
    dense = torch.zeros(positions, VOCABULARY, dtype=torch.bfloat16)
    for place, row_ids, row_logprobs in zip(places, ids, logprobs, strict=True):
        dense[place, torch.tensor(row_ids)] = torch.tensor(row_logprobs).exp().to(dense.dtype)
    return dense


def _training_step(inputs: Inputs, targets: Targets) -> Callable[[], None]:
    torch.manual_seed(1)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 11, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes))
    tokens = torch.from_numpy(inputs.tokens)
    labels, ids, logprobs, ce_weight, kl_weight = (
        torch.from_numpy(array).flatten(0, 1) for array in vars(targets).values()
    )

    def step() -> None:
        logits = model(tokens, use_cache=False).logits[0]
        loss, *_ = sparse_kl_cross_entropy(
            logits, labels, ids, logprobs, ce_weight=ce_weight, kl_weight=kl_weight
        )
        loss.sum().backward()

    return step


def _opening(directory: Path, shards: int, repeats: int) -> Measurement:
    """Opening one field of 200,000 documents, as 100 M tokens are in documents of 500, in so many shards."""
    directory.mkdir()
    prefixes = [directory / f"shard-{number:05d}.match" for number in range(shards)]
    documents = max(200_000 // shards, 1)
    for prefix in prefixes:
        write_stream(prefix, np.zeros(documents, np.uint8), np.ones(documents, np.int64))
    seconds = _best(lambda: Stream(prefixes), repeats)
    return Measurement(
        f"opening a field of {shards} shards, {shards * documents:,} documents", 1e3 * seconds, "ms"
    )


def _best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of so many runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
