"""Peak memory of the export of a checkpoint, by the size of one file of weights.

    python benchmarks/export_memory.py --layers 24 --csv runs/export_memory.csv

The model is a random Llama in fp32. The export runs in a process of its own. What counts is the largest
resident set that the system saw of it (getrusage), above that before the export. A part of it does not depend
on the size of the files, such as modules that are imported on the way: the second figure is the growth of the
peak with a file of twice the size.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from table import Measurement, run
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_fuse.processes import end_with_pool

_MEBIBYTE = 2**20
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=24, help="layers of the model, of 17 MiB each")
    parser.add_argument("--shard-mebibytes", type=int, default=100, help="size of a file of weights")


def measure(options: argparse.Namespace) -> list[Measurement]:
    shard = options.shard_mebibytes
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        checkpoint, size = _apart(_make, directory, options.layers)
        small, large = (_apart(_export, checkpoint, directory, times * shard) for times in (1, 2))
    title = f"export of a model of {size:,.0f} MiB: peak memory"
    allowed = 1.2 * shard + 1e9 / _MEBIBYTE
    return [
        Measurement(f"{title}, above the start", small, "MiB", "1.2 files + 1 GB", allowed, "ratio <= 1"),
        Measurement(f"{title}, growth", large - small, "MiB", "growth of a file", shard, ""),
    ]


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, end_with_pool) as pool:
        return pool.apply(function, arguments)


def _make(directory: Path, layers: int) -> tuple[Path, float]:
    """The checkpoint of a model in `directory`/model, and the MiB of its weights."""
    from megatron_fuse.runtime import start_runtime

    start_runtime()
    from megatron_fuse.training.target import import_hugging_face

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory / "model")
    mebibytes = sum(parameter.nbytes for parameter in model.parameters()) / _MEBIBYTE
    return import_hugging_face(directory / "model", directory / "checkpoint"), mebibytes


def _export(checkpoint: Path, directory: Path, shard_mebibytes: int) -> float:
    """MiB at the peak, above the peak before the export."""
    from megatron_fuse.training.export import export_checkpoint

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shard_bytes = shard_mebibytes * _MEBIBYTE
    export_checkpoint(
        checkpoint, directory / "model", directory / f"export-{shard_mebibytes}", shard_bytes=shard_bytes
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - before) * _UNIT / _MEBIBYTE


if __name__ == "__main__":
    raise SystemExit(run(__doc__, add_arguments, measure))
