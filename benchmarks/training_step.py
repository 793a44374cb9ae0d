"""What fusion adds to a training step: beside plain fine-tuning, with dense teacher targets, over
vocabularies and entries.

    python benchmarks/training_step.py --csv docs/benchmarks/training.csv [--plot \
        docs/benchmarks/training_step.png]

The steps are the trainer's own: plan, collation, forward pass, loss, backward pass and optimizer of a random
Llama over synthetic documents of --seq-length tokens, three quarters of them labels. Two kinds of step take
turns over the same documents, so that a slow spell of the machine meets both; figures are medians.

    fine-tuning     the same documents without teacher's rows, and the same loss code at KL weight 0
    dense targets   baseline: the teacher's distribution as a tensor of the logits' size, with the usual dense
                    KL and cross entropy
    around it       planning, collation, logging: all but forward pass, backward pass and optimizer
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from synthetic_documents import write_documents
from table import Measurement, medians_in_turns, run
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_fuse.fusion_data.documents import Document, DocumentStreams
from megatron_fuse.model.gpt import FusionTargets
from megatron_fuse.recipe import make_recipe
from megatron_fuse.runtime import Runtime, start_runtime, stop_runtime
from megatron_fuse.target import read_target
from megatron_fuse.training.batches import micro_batches
from megatron_fuse.training.target import build_target
from megatron_fuse.training.throughput import training_flops
from megatron_fuse.training.trainer import Trainer, make_trainer, plan_step, train_step

VOCABULARY, ENTRIES = 32000, 10
WEIGHTS = {"training": (1.0, 0.5)}
NO_KL = {"training": (1.0, 0.0)}
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 11, "num_attention_heads": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq-length", type=int, default=512, help="tokens per sequence in the main comparison"
    )
    parser.add_argument(
        "--scaling-seq-length",
        type=int,
        default=128,
        help="tokens per sequence in the steps over vocabularies and entries",
    )
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[8192, 32768, 65536, 128256])
    parser.add_argument("--entries", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument(
        "--pairs", type=int, default=20, help="number of pairs of steps, one step of each kind"
    )
    parser.add_argument("--scaling-pairs", type=int, default=7)
    parser.add_argument(
        "--plot", type=Path, help="PNG file for the plot of steps over vocabularies and entries"
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    runtime = start_runtime()
    with tempfile.TemporaryDirectory() as directory:
        measurements = _main_comparison(Path(directory) / "main", runtime, options)
        scaling = {}
        for vocabulary in options.vocabularies:
            where = Path(directory) / f"vocabulary-{vocabulary}"
            scaling["vocabulary", vocabulary] = _scaling(where, runtime, options, vocabulary, ENTRIES)
        for entries in options.entries:
            where = Path(directory) / f"entries-{entries}"
            scaling["entries a row", entries] = _scaling(where, runtime, options, VOCABULARY, entries)
    for (what, size), (fusion, tuning) in scaling.items():
        measurements.append(
            Measurement(f"{what} {size}: fusion step", fusion, "ms", "fine-tuning step", tuning)
        )
    if options.plot:
        _draw(scaling, options.plot)
    stop_runtime()
    return measurements


def _main_comparison(directory: Path, runtime: Runtime, options: argparse.Namespace) -> list[Measurement]:
    fusion = _trainer(directory, runtime, options.seq_length, VOCABULARY, ENTRIES)
    tuning = replace(fusion, dataset=Documents(fusion.dataset.streams))
    fusion_step, tuning_step = (lambda: _step(fusion, WEIGHTS)), (lambda: _step(tuning, NO_KL))
    of_fusion, of_tuning = _milliseconds(options.pairs, fusion_step, tuning_step)
    model = fusion.chunks[0]
    sparse = model.compute_language_model_loss

    def dense_step() -> None:
        model.compute_language_model_loss = MethodType(_dense_loss, model)
        _step(fusion, WEIGHTS)
        model.compute_language_model_loss = sparse

    beside_dense, of_dense = _milliseconds(max(options.pairs // 4, 2), fusion_step, dense_step)
    fusion.log.start(0)
    (around,) = _milliseconds(options.pairs, lambda: _around(fusion))
    size = sum(parameter.numel() for parameter in model.parameters())
    name = f"fusion step, {size / 1e6:.0f} M parameters, {options.seq_length} tokens"
    return [
        Measurement(name, of_fusion, "ms", "fine-tuning step", of_tuning, "ratio <= 1.05"),
        Measurement(name, beside_dense, "ms", "step with dense targets", of_dense),
        Measurement(
            "planning, collation and logging of a step",
            around,
            "ms",
            "fusion step",
            of_fusion,
            "ratio <= 0.02",
        ),
    ]


def _scaling(
    directory: Path, runtime: Runtime, options: argparse.Namespace, vocabulary: int, entries: int
) -> tuple[float, float]:
    """Milliseconds of a fusion step and of a fine-tuning step."""
    fusion = _trainer(directory, runtime, options.scaling_seq_length, vocabulary, entries)
    tuning = replace(fusion, dataset=Documents(fusion.dataset.streams))
    of_fusion, of_tuning = _milliseconds(
        options.scaling_pairs, lambda: _step(fusion, WEIGHTS), lambda: _step(tuning, NO_KL)
    )
    return of_fusion, of_tuning


def _trainer(directory: Path, runtime: Runtime, seq_length: int, vocabulary: int, entries: int) -> Trainer:
    """A trainer over documents with teacher's rows, one a step, for a random Llama of SIZES."""
    directory.mkdir()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=seq_length, tie_word_embeddings=True, **SIZES
    )
    LlamaForCausalLM(config).save_pretrained(directory / "target")
    recipe = make_recipe(
        {
            "workdir": str(directory / "run"),
            "target": {"model": str(directory / "target")},
            "sources": {"source": {"model": str(directory / "target")}},
            "data": {"path": "none.jsonl"},
            "schedule": {"preset": "fuse"},
            "training": {"seq_length": seq_length, "global_batch_size": 1, "precision": "fp32"},
        }
    )
    target = read_target(recipe)
    draw = np.random.default_rng(7)
    streams = write_documents(directory / "documents", np.full(8, seq_length), draw, vocabulary, entries)
    chunks = build_target(recipe, target)
    return make_trainer(recipe, runtime, target.architecture, chunks, Documents(streams, entries + 1))


class Documents:
    """The reader's interface over documents of one mode, all to be learned from. entries_per_row: 0 leaves
    the rows out.
    """

    def __init__(self, streams: DocumentStreams, entries_per_row: int = 0) -> None:
        self.streams, self.entries_per_row = streams, entries_per_row
        self.sources = ["source"]
        self.example_ids = [str(number) for number in range(len(streams))]
        self.train, self.validation = np.arange(len(streams)), np.arange(0)
        self.sha256 = "synthetic"
        self.curriculum = None

    def lengths(self, mode: str) -> np.ndarray:
        return self.streams.lengths

    def supervised_tokens(self, mode: str) -> np.ndarray:
        return self.streams.supervised_tokens

    def example_weights(self, mode: str) -> np.ndarray:
        return np.ones(len(self.example_ids), np.float32)

    def winners(self, mode: str) -> np.ndarray:
        return np.zeros(len(self.example_ids), np.int16)

    def document(self, mode: str, example: int) -> Document:
        document = self.streams[example]
        if self.entries_per_row:
            return document
        nothing = np.zeros_like(document.counts)
        entries = document.teacher_ids[:0], document.teacher_logprobs[:0]
        return Document(document.tokens, document.supervised, nothing, *entries, nothing)


def _step(trainer: Trainer, weights: dict[str, tuple[float, float]]) -> None:
    train_step(trainer, plan_step(trainer, trainer.dataset.train[:1], weights), 1e-5)


def _around(trainer: Trainer) -> None:
    """What a step has beside forward pass, backward pass and optimizer."""
    batch = plan_step(trainer, trainer.dataset.train[:1], WEIGHTS)
    parts = {"data_parallel_rank": 0, "data_parallel_size": 1, "with_targets": True}
    list(micro_batches(trainer.dataset, batch, **parts, device=trainer.runtime.device))
    values = {"loss": 1.0, "ce/training": 1.0, "kl/training": 1.0, "grad norm": 1.0, "padding": 0.0}
    flops = training_flops(trainer.architecture, batch.positions)
    trainer.log.step(1, 1, "phase", 1e-5, values, batch.tokens, flops)


def _dense_loss(model: torch.nn.Module, targets: FusionTargets, logits: torch.Tensor) -> torch.Tensor:
    """In FusionGPTModel's place of `compute_language_model_loss`: [6, b, s] from logits [s, b, v], tail
    ignored; the last three are left at 0.
    """
    z = logits.transpose(0, 1).float()
    temperature = model.loss_options.temperature
    mass = targets.teacher_logprobs.exp().where(targets.teacher_ids >= 0, 0)
    teacher = torch.zeros_like(z).scatter_add(2, targets.teacher_ids.clamp(min=0), mass)
    kl = F.kl_div(F.log_softmax(z / temperature, -1), teacher, reduction="none").sum(-1)
    ce = F.cross_entropy(z.flatten(0, 1), targets.labels.flatten(), reduction="none").view_as(kl)
    losses = targets.ce_weight * ce + targets.kl_weight * kl, ce.detach(), kl.detach()
    return torch.stack([*losses, *[torch.zeros_like(kl)] * 3])


def _milliseconds(repeats: int, *works: Callable[[], None]) -> list[float]:
    """Medians of each, all taken in turns after one that does not count."""
    medians_in_turns(1, *works)
    return [1e3 * seconds for seconds in medians_in_turns(repeats, *works)]


def _draw(scaling: dict[tuple[str, int], tuple[float, float]], path: Path) -> None:
    kinds = list(dict.fromkeys(what for what, _ in scaling))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.5 * len(kinds), 3.2), squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        sizes = [size for what, size in scaling if what == kind]
        for place, name in enumerate(("fusion step", "fine-tuning step")):
            axis.plot(sizes, [scaling[kind, size][place] for size in sizes], marker="os"[place], label=name)
        axis.set(
            xlabel=kind, ylabel="ms", xscale="log", xticks=sizes, xticklabels=[f"{size:,}" for size in sizes]
        )
        axis.minorticks_off()
        axis.set_ylim(0, 1.1 * max(max(scaling[kind, size]) for size in sizes))
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
