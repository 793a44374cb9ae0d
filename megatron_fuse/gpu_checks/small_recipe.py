"""Runs a small recipe from instructions to an exported model.

It runs every stage, kills the training and resumes it, and loads the export with transformers.
"""

import json
import multiprocessing
import runpy
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.errors import UserError
from megatron_fuse.gpu_checks.rows import Row, held, holds, measured
from megatron_fuse.gpu_checks.small_models import write_instructions, write_models
from megatron_fuse.pipeline import steps
from megatron_fuse.processes import end_with_pool
from megatron_fuse.recipe import Recipe, dump_recipe, make_recipe
from megatron_fuse.stages import Stage
from megatron_fuse.training.checkpoint_files import LATEST
from megatron_fuse.training.directories import checkpoint_directory, export_directory, metrics_directory
from megatron_fuse.training.metrics import METRICS, STEP, read_metrics
from megatron_fuse.training.stage import EXPORT, TRAINING

_SAVE_INTERVAL = 6
_STEPS_BEYOND = 2  # steps after a checkpoint at which the training is killed
_POLL = 0.02  # seconds between two looks at the training
_BF16 = 0.02  # relative difference between two computations of one loss in bf16


def run(device: str, directory: Path) -> Iterator[Row]:
    context: SpawnContext | ForkContext = multiprocessing.get_context("spawn")
    if device == "cpu":
        context = multiprocessing.get_context("fork")
    recipe = small_recipe(directory)
    path = directory / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    for name, (work, *_) in steps(recipe).items():
        if work.stage not in (TRAINING, EXPORT):
            yield from _run(context, name, work.stage, path)
    killed = _train_and_kill(context, recipe, path)
    yield measured("training, killed at step", max(killed))
    yield from _run(context, "training, resumed", TRAINING, path)
    yield from _twice(device, killed, _losses(recipe))
    yield from _run(context, "export", EXPORT, path)
    yield _read_again(device, recipe)


def small_recipe(directory: Path) -> Recipe:
    """A recipe in bf16. Its models and instructions are written into the directory."""
    models = {name: str(path) for name, path in write_models(directory / "models").items()}
    write_instructions(directory / "instructions.jsonl", count=28)
    return make_recipe(
        {
            "workdir": str(directory / "run"),
            "target": {"model": models["alpha"]},
            "sources": {name: {"model": models[name]} for name in ("alpha", "beta")},
            "reward_models": {"reward": {"model": models["reward"]}},
            "data": {"path": str(directory / "instructions.jsonl"), "validation_samples": 4},
            "responses": {"max_new_tokens": 12},
            "schedule": {
                "phases": [
                    {"name": "inference", "epochs": 1, "inference": {"weight": 1, "lambda": 0.5}},
                    {
                        "name": "co-fusion",
                        "epochs": 3,
                        "inference": {"weight": 0.5, "lambda": 0.5},
                        "training": {"weight": 1, "lambda": 0.5},
                    },
                ]
            },
            "training": {
                "seq_length": 160,
                "micro_batch_size": 4,
                "global_batch_size": 4,
                "lr": 1e-3,
                "precision": "bf16",
                "save_interval": _SAVE_INTERVAL,
                "async_save": True,
            },
            "export": {"dtype": "fp32"},
        }
    )


def _run(context: SpawnContext | ForkContext, name: str, stage: Stage, recipe: Path) -> Iterator[Row]:
    """Runs the command of a stage to its end.

    Raises UserError if it fails, as the later stages need its result.
    """
    began = time.perf_counter()
    process = _start(context, stage, recipe)
    process.join()
    if process.exitcode:
        raise UserError(f"{stage.command} ended with exit code {process.exitcode}")
    yield measured(name, time.perf_counter() - began, "s")


def _start(context: SpawnContext | ForkContext, stage: Stage, recipe: Path) -> BaseProcess:
    process = context.Process(target=_become, args=([*stage.module, "--recipe", str(recipe)],))
    process.start()
    return process


def _become(words: list[str]) -> None:
    """Runs `python *words` in this process. words: `-m`, a module and its arguments."""
    end_with_pool()
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def _train_and_kill(context: SpawnContext | ForkContext, recipe: Recipe, path: Path) -> dict[int, float]:
    """Starts a training and kills it some steps after a checkpoint that was written asynchronously.

    Returns step -> loss.
    """
    training = _start(context, TRAINING, path)
    tracker = checkpoint_directory(recipe) / LATEST
    while training.is_alive():
        saved = int(tracker.read_text()) if tracker.exists() else None
        if saved and max(_losses(recipe), default=0) >= saved + _STEPS_BEYOND:
            training.kill()
            break
        time.sleep(_POLL)
    training.join()
    if training.exitcode is not None and training.exitcode >= 0:
        raise UserError(
            f"{TRAINING.command} ended with exit code {training.exitcode} before it could be killed"
        )
    return _losses(recipe)


def _losses(recipe: Recipe) -> dict[int, float]:
    """Step -> loss, of every step that the run has recorded."""
    path = metrics_directory(recipe) / METRICS
    rows = read_metrics(path) if path.exists() else []
    return {row["iteration"]: row["loss"] for row in rows if row["kind"] == STEP}


def _twice(device: str, killed: dict[int, float], whole: dict[int, float]) -> Iterator[Row]:
    """Compares the losses of the killed run with those of the resumed run, which repeated the last steps."""
    steps = sorted(killed)
    yield holds(
        "training, resumed: has every step",
        sorted(whole) == list(range(1, max(whole) + 1)),
        str(sorted(whole)),
    )
    differences = [abs(killed[step] - whole[step]) / abs(whole[step]) for step in steps]
    limit = 0 if device == "cpu" else _BF16  # on a GPU the order of sums may differ
    yield held(
        "training, resumed: largest difference of a loss", max(differences), "relative", f"<= {limit:g}"
    )


def _read_again(device: str, recipe: Recipe) -> Row:
    """Compares the validation cross-entropy of the training with that of transformers on the export."""
    exported = export_directory(recipe)
    metadata = json.loads((exported / "fusion.json").read_text(encoding="utf-8"))["facts"]
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
    model = model.to(device).eval()
    loss = _cross_entropy(FusionDataset(recipe), model)
    difference = abs(loss - metadata["best_loss"]) / metadata["best_loss"]
    return held(
        "export, read by transformers: difference of the validation loss",
        difference,
        "relative",
        f"<= {_BF16}",
    )


@torch.inference_mode()
def _cross_entropy(dataset: FusionDataset, model: PreTrainedModel) -> float:
    """Cross-entropy of the validation documents, in nats per label."""
    total, count = 0.0, 0
    for example in dataset.validation:
        document = dataset.document("training", int(example))
        tokens = document.tokens.astype(np.int64)
        logits = model(torch.from_numpy(tokens)[None].to(model.device)).logits[0].cpu()
        labels = np.flatnonzero(document.supervised)
        total -= logits.double().log_softmax(-1)[labels - 1, tokens[labels]].sum().item()
        count += len(labels)
    return total / count
