"""What a plan says of time, beside the time that the work takes on this machine.

    OMP_NUM_THREADS=1 python benchmarks/planned_times.py --csv docs/benchmarks/planning.csv

The rates are measured with one model, written as check-gpu writes them, and read by the plan of another
model, which is deeper and has a larger vocabulary and other lengths. Times are of the processor, with one
thread, so that other programs of the machine do not count. About two minutes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import Measurement, run

from megatron_fuse.gpu_checks.reading import random_conversations, random_model, random_reader
from megatron_fuse.gpu_checks.rows import Row, measured
from megatron_fuse.gpu_checks.synthetic import RandomDocuments, random_trainer, recipe_of_random_target
from megatron_fuse.planning.durations import (
    FILLED_PLACES,
    Layout,
    TrainingWork,
    answering_seconds,
    reading_seconds,
    training_seconds,
)
from megatron_fuse.planning.gpus import Cluster, Gpu
from megatron_fuse.planning.rates import MEASURED, Rates, assumed_rates, read_rates
from megatron_fuse.planning.sizes import size_of
from megatron_fuse.runtime import Runtime, start_runtime
from megatron_fuse.sources.generation import Prompt, Sampling, generate

_WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
_MEASURED = {**_WIDTHS, "vocab_size": 4096, "num_hidden_layers": 4}  # 5 million parameters
_PLANNED = {**_WIDTHS, "vocab_size": 16384, "num_hidden_layers": 8}  # 15 million
_ROWS = 16  # answers that are written together
# Stands for the GPU. Only rates that the file lacks are taken from it, and of these no work here needs one.
_THIS_CPU = Gpu("this CPU", memory=16e9, flops=1e11, bandwidth=1e10, link=1e10)


def main() -> int:
    return run(__doc__ or "", lambda parser: None, measure)


def measure(_: argparse.Namespace) -> list[Measurement]:
    torch.set_num_threads(1)
    runtime = start_runtime()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        rows = [*_rates_of_training(runtime, directory / "a"), *_rates_of_reading(directory / "b")]
        file = directory / "checks.jsonl"
        file.write_text("".join(row.json() + "\n" for row in rows))
        rates = read_rates(file, assumed_rates(_THIS_CPU))
        return [
            *_training(runtime, rates, directory / "c"),
            *_reading(rates, directory / "d"),
            *_answering(rates),
        ]


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median processor time of the work, after one time that does not count."""
    times = []
    for _ in range(1 + repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def _row(name: str, value: float) -> Row:
    """A rate as check-gpu writes it."""
    of = MEASURED[name]
    return replace(measured(of.what, value / of.size, of.unit), check=of.check)


def _trainer(
    runtime: Runtime, directory: Path, sizes: dict[str, Any], positions: int, documents: int
) -> tuple[Any, Callable[[], object]]:
    from megatron_fuse.training.trainer import plan_step, train_step

    training = {"global_batch_size": documents, "micro_batch_size": 2, "precision": "fp32"}
    recipe = recipe_of_random_target(directory, sizes, positions, training=training)
    dataset = RandomDocuments([positions] * documents, sizes["vocab_size"], entries=10)
    trainer = random_trainer(recipe, runtime, dataset)
    batch = plan_step(trainer, dataset.train, {"training": (1.0, 0.5)})
    return trainer, lambda: train_step(trainer, batch, 1e-5)


def _rates_of_training(runtime: Runtime, directory: Path) -> Iterator[Row]:
    from megatron_fuse.training.throughput import training_flops

    trainer, step = _trainer(runtime, directory, _MEASURED, positions=256, documents=4)
    flops = training_flops(trainer.architecture, np.full(4, 256))
    yield _row("training", flops / _seconds(step))


def _lengths(longest: int, count: int) -> list[int]:
    return np.linspace(longest // 4, longest, count).astype(int).tolist()


def _capture(directory: Path, sizes: dict[str, Any], lengths: Sequence[int]) -> tuple[float, float, float]:
    """Seconds of a capture; the tokens that are read, and those whose logits are computed."""
    model = random_model(sizes, "cpu", torch.float32)
    conversations = random_conversations(lengths, sizes["vocab_size"])
    reader = random_reader(directory, model, sizes)
    supervised = sum(int(each.readable.supervised.sum()) for each in conversations)
    return _seconds(lambda: reader.capture_shard(conversations)), sum(lengths), supervised


def _rates_of_reading(directory: Path) -> Iterator[Row]:
    lengths = _lengths(256, 24)
    seconds, tokens, supervised = _capture(directory, _MEASURED, lengths)
    model = random_model(_MEASURED, "cpu", torch.float32)
    size = size_of(model.config)
    yield _row("reading", size.forward_flops(tokens, tokens / len(lengths), supervised) / seconds)
    step = _decoding(model, prompt=64, room=33, rows=_ROWS) / 32
    yield _row("layer_seconds", step / size.layers)


def _decoding(model: Any, *, prompt: int, room: int, rows: int) -> float:
    """Seconds of all steps after the first, which reads the prompts."""
    draw = np.random.default_rng(1)
    ids = [draw.integers(3, model.config.vocab_size, prompt).tolist() for _ in range(rows)]
    sampling = Sampling(frozenset(), torch.ones(model.config.vocab_size, dtype=torch.bool))

    def answer(most: int) -> None:
        prompts = [Prompt(str(number), each, most, seed=number) for number, each in enumerate(ids)]
        generate(model, prompts, sampling, batch_tokens=rows * (prompt + room))

    return _seconds(lambda: answer(room)) - _seconds(lambda: answer(1))


def _training(runtime: Runtime, rates: Rates, directory: Path) -> list[Measurement]:
    positions, documents = 384, 6
    trainer, step = _trainer(runtime, directory, _PLANNED, positions, documents)
    work = TrainingWork(positions * documents, positions, steps=1)
    size = size_of(random_model(_PLANNED, "cpu", torch.float32).config)
    planned = training_seconds(trainer.recipe, size, work, Cluster(_THIS_CPU, 1), rates)
    return _beside("a training step", planned, _seconds(step))


def _reading(rates: Rates, directory: Path) -> list[Measurement]:
    lengths = _lengths(512, 16)
    seconds, tokens, supervised = _capture(directory, _PLANNED, lengths)
    planned = reading_seconds(
        size_of(random_model(_PLANNED, "cpu", torch.float32).config),
        "fp32",
        Layout("hf"),
        rates,
        tokens=tokens,
        mean_length=tokens / len(lengths),
        logits=supervised,
        shards=1,
        batch_tokens=16384,
    )
    return _beside("a capture", planned, seconds)


def _answering(rates: Rates) -> list[Measurement]:
    prompt, room = 128, 65
    model = random_model(_PLANNED, "cpu", torch.float32)
    planned = answering_seconds(
        size_of(model.config),
        "fp32",
        Layout("hf"),
        rates,
        # All places are filled here: as many answers as the plan would fill them with.
        answers=_ROWS * FILLED_PLACES,
        prompt=0,
        answer=room - 1,
        rows=_ROWS,
        shards=1,
    )
    return _beside("decoding", planned, _decoding(model, prompt=prompt, room=room, rows=_ROWS))


def _beside(name: str, planned: float, seconds: float) -> list[Measurement]:
    error = abs(planned / seconds - 1)
    return [
        Measurement(f"planned time of {name}", planned, "s", "measured", seconds),
        Measurement(f"planned time of {name}: error", error, "of the measured time", wanted="<= 0.3"),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
