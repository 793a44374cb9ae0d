"""What our own stages wrote: plans, markers, manifests, shards, journals, results, metrics.

Damage is refused or made good, never read.
"""

import json
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from campaign import FuzzTarget
from data_targets import TEXTS, rows_in, shared
from file_damage import Mutation, mutate
from small_models import small_recipe, write_rows

from megatron_fuse.evaluation.benchmarks import BENCHMARKS
from megatron_fuse.evaluation.comparison import compare
from megatron_fuse.evaluation.results import Metric, Result, load_result, result_path
from megatron_fuse.instructions import INSTRUCTIONS, example_shards, prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.report.loss_curve import draw_losses
from megatron_fuse.responses import RESPONSES, generate_responses, response_shards
from megatron_fuse.responses.journal import open_journal
from megatron_fuse.scoring.scores import load_scores, score_responses
from megatron_fuse.sources.completions import Reply
from megatron_fuse.stages import Context
from megatron_fuse.storage import Plan, open_artifact, run_plan, sha256_of_file
from megatron_fuse.training.metrics import METRICS, STEP, MetricsFile, read_metrics


@cache
def _recipe(directory: Path) -> Recipe:
    return small_recipe(
        directory / "run",
        directory / "data.jsonl",
        shared(),
        {"s": {"model": str(shared()), "responses": str(directory / "answers.jsonl")}},
        data={"shard_size": 3, "validation_samples": 1},
        reward_models={"reward": {"scores": str(directory / "scores.jsonl")}},
    )


def _make_stages(directory: Path) -> None:
    write_rows(directory / "data.jsonl", rows_in("messages"))
    write_rows(
        directory / "answers.jsonl", [{"id": f"e{n}", "response": text} for n, text in enumerate(TEXTS)]
    )
    write_rows(directory / "scores.jsonl", [{"id": f"e{n}", "scores": {"s": n / 3}} for n in range(8)])
    recipe = _recipe(directory)
    prepare_instructions(Context(recipe))
    generate_responses(Context(recipe), "s")
    score_responses(Context(recipe), "reward", ["s"])


def _content(recipe: Recipe) -> str:
    """A hash of all that later stages read of the three."""
    found: list[Any] = [list(example_shards(Context(recipe).open(INSTRUCTIONS)))]
    found += [
        list(response_shards(Context(recipe).open(RESPONSES, "s"))),
        load_scores(Context(recipe), "s", "reward").tolist(),
    ]
    return sha256(repr(found).encode()).hexdigest()


@cache
def _expected(directory: Path) -> str:
    """The child reads the undamaged files first."""
    return _content(_recipe(directory))


def _read_stages(directory: Path) -> None:
    assert _content(_recipe(directory)) == _expected(directory), "other content, and no word about it"


def _sealed(path: Path, random: Random) -> Mutation:
    """What a checksum finds has no key."""
    found = mutate(path, random)
    return Mutation(found.file, f"file of a stage, {found.what}")


def _own_up(path: Path, random: Random) -> Mutation:
    """The manifest is an older version's, which states no sha256 of itself, and says of the other files
    what they now hold.
    """
    manifest = path.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    content.pop("sha256", None)
    manifest.write_text(json.dumps(content))
    found = mutate(path, random)
    if path != manifest and path.is_file() and path.name in content["files"]:
        content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        manifest.write_text(json.dumps(content))
    return found


def _read_owned_up(directory: Path) -> None:
    _content(_recipe(directory))


def _plan(directory: Path) -> Plan:
    return Plan(directory / "made", "stage", {"seed": 1, "list": [0.5, None]}, {"model": "x" * 64}, shards=3)


def _make(index: int, prefix: Path) -> dict[str, int]:
    for suffix in ("npy", "txt"):
        prefix.with_name(f"{prefix.name}.{suffix}").write_bytes(bytes([index]) * (100 + index))
    return {"items": index}


def _make_part(directory: Path) -> None:
    """Complete, and cut off before the manifest."""
    run_plan(_plan(directory), _make)
    run_plan(_plan(directory / "cut_off"), _make)
    (directory / "cut_off/made/manifest.json").unlink()


def _rerun(directory: Path) -> None:
    """Ends with the whole artifact, or refuses."""
    for root in (directory, directory / "cut_off"):
        plan = _plan(root)
        artifact = run_plan(plan, _make)
        assert artifact is not None
        assert artifact.verify().counts == {"items": 3} and len(artifact.manifest["files"]) == 6
        assert open_artifact(plan.directory, "stage", "the command", options=plan.options) == artifact
        for index in range(3):
            data = (plan.directory / f"shard-{index:05d}.npy").read_bytes()
            assert data == bytes([index]) * (100 + index), "other content, and no word about it"


def _write_journal(directory: Path) -> None:
    with open_journal(directory / "journal.jsonl") as journal:
        for n, text in enumerate(TEXTS):
            journal.add(f"{n:064x}", Reply(text, truncated=n == 1, fault="no answer" if n == 2 else None))


def _read_journal(directory: Path) -> None:
    with open_journal(directory / "journal.jsonl") as journal:
        for n in range(len(TEXTS)):
            request = f"{n:064x}"
            reply = journal.reply(request) if request in journal else None
            assert reply is None or (reply.text + str(reply.fault)).encode()
        journal.add("f" * 64, Reply("more"))


def _write_results(directory: Path) -> None:
    for place, model in enumerate(("alpha", "beta")):
        outcomes = [float((n + place) % 3 == 0) for n in range(6)]
        metrics = {
            "acc,none": Metric(float(np.mean(outcomes)), 0.1, outcomes),
            "acc_norm,none": Metric(None, None, [None] * 6),
        }
        made_from = {"data": {"mmlu_test.jsonl": "x" * 64}, "limit": None}
        questions = [f"mmlu/{n} {n:016x}" for n in range(6)]
        Result(model, "mmlu", made_from, f"/models/{model}", 8, 1.5, 128, 2, questions, metrics).save(
            directory
        )


def _read_results(directory: Path) -> None:
    models = ["alpha", "beta"]
    results = {(model, "mmlu"): load_result(result_path(directory, model, "mmlu")) for model in models}
    compare(results, {}, models, [BENCHMARKS["mmlu"]], "alpha")


def _write_metrics(directory: Path) -> None:
    file = MetricsFile(directory / METRICS, continue_at=0)
    for step in range(1, 9):
        losses = {
            "loss": 1 / step,
            "ce/training": 1.0,
            "kl/training": 0.5,
            "grad norm": 1.0,
            "learning rate": 1e-4,
        }
        file.write(STEP, step, {"phase": "first" if step < 5 else "second", **losses, "tokens": 100})
        file.write("held-out", step, {"ce/training": 1.1, "kl/training": 0.2})
    file.close()


def _read_metrics(directory: Path) -> None:
    rows = read_metrics(directory / METRICS)
    if any(row["kind"] == STEP and row["loss"] is not None for row in rows):
        draw_losses(rows)
    MetricsFile(directory / METRICS, continue_at=4).close()


# An artifact that was made from another one, or by another version, is not to be blamed on one key of it.
_OTHERS = ("was made with inputs.", "is needed")

TARGETS = [
    FuzzTarget("stages", _make_stages, _read_stages, ("run/**/*",), 0.5, _sealed),
    FuzzTarget("stages-owned-up", _make_stages, _read_owned_up, ("run/**/*",), 0.5, _own_up, names=_OTHERS),
    FuzzTarget("plans", _make_part, _rerun, change=_sealed),
    FuzzTarget("journal", _write_journal, _read_journal),
    FuzzTarget("evaluation-results", _write_results, _read_results, names=("mmlu: alpha answered",)),
    FuzzTarget("metrics", _write_metrics, _read_metrics, share=0.3),
]
