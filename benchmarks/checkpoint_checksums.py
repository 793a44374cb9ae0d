"""What checksums cost a checkpoint's save and load, beside Megatron's own writer and reader without any.

    python benchmarks/checkpoint_checksums.py [--parameters 100] [--pairs 9] [--directory DIR] [--csv \
        docs/benchmarks/checkpoints.csv]

One process saves and loads the fp32 weights of a random model, through the code that trains and exports; both
ways take turns, so that a slow spell of the machine meets both; figures are medians. DIR should be on the
disk that checkpoints are saved to.

    save, load        wall time; loads read from the page cache, where a checksum weighs most
    start-up          this process until the model was built, and the load
    CPU of            seconds of this process and of its writers: what a machine without an idle core would
                      pay
    --no-verify       the same reader without comparing
    Megatron's own    dist_checkpointing.save and load with their default strategies: no checksum, a CRC32 of
                      every tensor on saving
"""

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from statistics import median
from unittest.mock import patch

import psutil
import torch
from table import Measurement, run
from transformers import LlamaConfig

from megatron_fuse.runtime import start_runtime, stop_runtime

HIDDEN, VOCABULARY = 1024, 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parameters", type=int, default=100, help="millions of parameters of 4 bytes")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument(
        "--directory",
        type=Path,
        help="directory for the checkpoints; default: the temporary directory of the system",
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    start_runtime()
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        return _measure(options, directory)
    finally:
        shutil.rmtree(directory)
        stop_runtime()


def _measure(options: argparse.Namespace, directory: Path) -> list[Measurement]:
    from megatron_fuse.model.architecture import read_architecture
    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.model.gpt import build_model_chunks
    from megatron_fuse.training.checkpoint import load_checkpoint, save_checkpoint
    from megatron_fuse.training.checkpoint_integrity import CheckpointFiles
    from megatron_fuse.training.checkpoint_metadata import CheckpointMetadata, model_identity, versions

    layer = 4 * HIDDEN**2 + 3 * HIDDEN * 2816
    layers = max(round((options.parameters * 1e6 - 2 * HIDDEN * VOCABULARY) / layer), 1)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_hidden_layers": layers,
    }
    LlamaConfig(vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(directory)
    architecture = read_architecture(directory)
    chunks = build_model_chunks(architecture, transformer_config(architecture, params_dtype=torch.float32))
    megabytes = sum(parameter.nbytes for parameter in chunks[0].parameters()) / 1e6
    metadata = CheckpointMetadata(0, 0, model_identity(architecture), {}, None, versions())
    path = directory / "saved/iter_0000000"

    def save() -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        save_checkpoint(path.parent, chunks, None, metadata)

    def load(verify: bool) -> None:
        load_checkpoint(path, chunks, None, architecture, verify=verify)

    def megatron_load() -> None:
        with megatrons_own():
            load(False)

    def megatron_save() -> None:
        with megatrons_own():
            save()

    started = time.time() - psutil.Process().create_time()
    rows = []
    for name, ours, theirs, baseline in (
        ("save", save, megatron_save, "Megatron's own"),
        ("load", lambda: load(True), lambda: load(False), "--no-verify"),
        ("load", lambda: load(True), megatron_load, "Megatron's own"),
    ):
        save()
        (wall, cpu), (wall_before, cpu_before) = _in_turns(options.pairs, ours, theirs)
        what = f"{name} of {megabytes:.0f} MB"
        wanted = "ratio <= 1.02" if theirs in (megatron_save, megatron_load) else ""
        rows.append(Measurement(what, wall, "s", baseline, wall_before, wanted=wanted))
        rows.append(Measurement(f"CPU of {what}", cpu, "s", baseline, cpu_before))
        if name == "load":
            both = (started + wall, started + wall_before)
            rows.append(Measurement(f"start-up with {what}", both[0], "s", baseline, both[1], wanted=wanted))
    start = time.perf_counter()
    CheckpointFiles(path, verify=True).compare_sizes(0, 1)
    return [*rows, Measurement("sizes and checksums.json", 1e3 * (time.perf_counter() - start), "ms")]


def _in_turns(pairs: int, *works: Callable[[], object]) -> list[tuple[float, float]]:
    """Median wall and CPU seconds of each, after one turn that is not counted."""
    turns: list[list[tuple[float, float]]] = [[] for _ in works]
    for turn in range(pairs + 1):
        order = list(enumerate(works))
        for index, work in order if turn % 2 else reversed(order):
            cpu, start = _cpu_seconds(), time.perf_counter()
            work()
            if turn:
                turns[index].append((time.perf_counter() - start, _cpu_seconds() - cpu))
    return [(median(wall for wall, _ in of_one), median(cpu for _, cpu in of_one)) for of_one in turns]


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def megatrons_own() -> Iterator[None]:
    """Within the block checkpoints are written and read by Megatron's default strategies, without
    checksums.
    """
    from megatron.core import dist_checkpointing

    from megatron_fuse.training import checkpoint, megatron_checkpoints

    # From 0.17 on: Megatron's own asynchronous saving, not that of nvidia-resiliency-ext.
    strategy = (
        {"async_strategy": "mcore"}
        if "async_strategy" in signature(dist_checkpointing.save).parameters
        else {}
    )

    def request_save(state: dict, directory: Path) -> tuple[object, dict]:
        return dist_checkpointing.save(state, str(directory), async_sharded_save=True, **strategy), {}

    def load(state: dict, opened: megatron_checkpoints.OpenedCheckpoint) -> dict:
        return dist_checkpointing.load(state, str(opened.files.path))

    with (
        patch.object(megatron_checkpoints, "request_save", request_save),
        patch.object(megatron_checkpoints, "load", load),
        patch.object(checkpoint, "write_checksums", lambda *_: None),
    ):
        yield


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
