"""The stages of a recipe in order: which artefacts each one makes, what is done, and roughly what the rest will cost.

The only place that knows the whole road. It runs nothing: tools/run_recipe.py starts the commands.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_fuse.advantage.reference_scores import plan_reference_scores, require_measures
from megatron_fuse.advantage.reward_models.forms import find_judge
from megatron_fuse.advantage.scores import plan_scores
from megatron_fuse.capture import plan_capture
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data import FusionDataset, modes_with_teacher
from megatron_fuse.fusion_data.layout import fusion_directory, teacher_directory, text_directory
from megatron_fuse.fusion_data.text import plan_text
from megatron_fuse.instructions import plan_instructions
from megatron_fuse.instructions.tables import table_bytes
from megatron_fuse.recipe import REFERENCE, Recipe
from megatron_fuse.responses import backend_of, plan_responses
from megatron_fuse.sources.huggingface import WEIGHT_SUFFIXES, resolve_model
from megatron_fuse.storage import Plan, Workspace, completed, open_artefact
from megatron_fuse.target import check_target_weights, checkpoint_directory, read_target
from megatron_fuse.training.checkpoint_files import LATEST
from megatron_fuse.training.schedule import make_schedule

# Bytes per parameter at which published weights are stored; only for estimates.
_WEIGHT_BYTES = 2
# Share of a bare matrix product's rate that a transformer's forward pass reaches; only for estimates.
_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Work:
    """One artefact of a stage."""

    name: str
    directory: Path
    plan: Callable[[], Plan] | None = None  # None: a manifest in the directory is all that can be asked for
    flops: float = 0.0
    disk: float = 0.0  # bytes

    def state(self) -> str:
        """`done`, `to do` or `k of n shards`. Raises UserError where the directory was made with other options or inputs."""
        if not (self.directory / "plan.json").exists():
            return "to do"
        if self.plan is None:
            return "done" if (self.directory / "manifest.json").exists() else "begun"
        plan = self.plan()
        if completed(plan):
            return "done"
        done = sum((self.directory / f"{name}.done").exists() for name in plan.names())
        return f"{done} of {plan.shards} shards"


@dataclass(frozen=True)
class Stage:
    """One command. `tool` is its script, run from the project's root."""

    name: str
    tool: str
    works: list[Work]

    def is_done(self) -> bool:
        return all(work.state() == "done" for work in self.works)


def require_whole_training(recipe: Recipe) -> None:
    """Raises UserError where training has ended early, as at a signal or by --exit-interval: such a model is not to be exported."""
    wanted = make_schedule(recipe, len(FusionDataset(recipe).train)).last_step(recipe.training.train_iters)
    reached = int((checkpoint_directory(recipe) / LATEST).read_text())
    if reached < wanted:
        raise UserError(f"training has stopped at step {reached} of {wanted}: run this again, and it continues")


def check_files(recipe: Recipe) -> None:
    """Refuses a recipe whose data, models or files are missing, all at once, or whose target cannot be trained as it says."""
    problems = []
    for check in _checks(recipe):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n       ".join(problems))
    check_target_weights(recipe, read_target(recipe))


def _checks(recipe: Recipe) -> Iterator[Callable[[], object]]:
    """Of all that the recipe names, whether or not its schedule uses it. What they call raises UserError for what is missing."""
    yield partial(table_bytes, recipe.data.path)
    models = {"target": recipe.target} | {f"sources.{name}": options for name, options in recipe.sources.items()}
    for key, options in models.items():
        yield partial(resolve_model, options.model, f"{key}.model")
        if options.responses:
            yield partial(_require, options.responses.path, f"{key}.responses")
    for name, source in recipe.sources.items():
        for mode, path in source.captures.items():
            yield partial(_require, path, f"sources.{name}.captures.{mode}")
    for name, judge in recipe.reward_models.items():
        if judge.scores:
            yield partial(_require, judge.scores.path, f"reward_models.{name}.scores")
        else:
            yield partial(find_judge, judge, name)
    if recipe.reference.bertscore_model:
        yield partial(resolve_model, recipe.reference.bertscore_model, "reference.bertscore_model")
    if any(REFERENCE in scorers for scorers in recipe.scorers.values()):
        yield partial(require_measures, recipe.reference)


def _require(path: Path, key: str) -> None:
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist")


def data_stages(recipe: Recipe) -> list[Stage]:
    """The stages before training, in order. Captures, answers and scores are made only where phases, selection or order use them."""
    workspace = Workspace(recipe.workdir)
    tokens = count_tokens(recipe)
    modes = modes_with_teacher(recipe)
    # About 6 of 10 entries are kept of real text by the default filter. Rows beside the entries: ids, places, sums.
    captured, fused = 8 * 0.6 * recipe.capture.top_k + 26, 4 * 0.6 * recipe.capture.top_k + 2

    def per_source_and_mode(make: Callable[[str, str], Work]) -> list[Work]:
        return [make(source, mode) for source in recipe.sources for mode in modes]

    responses = [
        Work(
            f"responses/{name}",
            workspace.responses(name),
            lambda name=name: plan_responses(recipe, name),
            flops=2 * _parameters(options.model) * tokens if backend_of(recipe, name) == "hf" else 0,
            disk=5 * tokens,
        )
        for name, options in recipe.answering.items()
    ]
    scores = [
        Work(
            f"scores/{name}/{scorer}",
            workspace.scores(name, scorer),
            lambda name=name, scorer=scorer: _plan_scores(recipe, name, scorer),
            flops=_scoring_flops(recipe, scorer, tokens),
        )
        for name, scorers in recipe.scorers.items()
        for scorer in scorers
    ]
    captures = per_source_and_mode(
        lambda source, mode: Work(
            f"captures/{source}/{mode}",
            workspace.captures(source, mode),
            lambda: plan_capture(recipe, source, mode),
            flops=0
            if mode in recipe.sources[source].captures
            else 2 * _parameters(recipe.sources[source].model) * tokens,
            disk=captured * tokens,
        )
    )
    fusion_name = f"fusion/{fusion_directory(recipe).name}"
    teachers = per_source_and_mode(
        lambda source, mode: Work(
            f"{fusion_name}/teachers/{source}/{mode}", teacher_directory(recipe, source, mode), disk=fused * tokens
        )
    )
    return [
        Stage(
            "instructions",
            "tools/prepare_instructions.py",
            [Work("instructions", workspace.instructions, lambda: plan_instructions(recipe))],
        ),
        *([Stage("responses", "tools/generate_responses.py", responses)] if responses else []),
        *([Stage("scores", "tools/score_responses.py", scores)] if scores else []),
        *([Stage("captures", "tools/capture_teacher.py", captures)] if captures else []),
        Stage(
            "fusion data",
            "tools/build_fusion_data.py",
            [
                Work(f"{fusion_name}/text", text_directory(recipe), lambda: plan_text(recipe), disk=3 * tokens),
                *teachers,
            ],
        ),
    ]


def _plan_scores(recipe: Recipe, name: str, scorer: str) -> Plan:
    return plan_reference_scores(recipe, name) if scorer == REFERENCE else plan_scores(recipe, name, scorer)


def _scoring_flops(recipe: Recipe, scorer: str, tokens: int) -> float:
    """A judge reads every answer once; BERTScore's encoder the ground truth as well. Scores from a file cost nothing."""
    if scorer == REFERENCE:
        encoder = recipe.reference.bertscore_model
        return 2 * _parameters(encoder) * 2 * tokens if encoder else 0
    judge = recipe.reward_models[scorer]
    return 0 if judge.scores else 2 * parameter_count(find_judge(judge, scorer).weights) * tokens


def training_flops(recipe: Recipe) -> float:
    """Forward and backward over all phases: 6 operations per parameter and token (Kaplan et al., arXiv 2001.08361)."""
    passes = sum(phase.epochs * (phase.inference.is_used + phase.training.is_used) for phase in recipe.phases)
    return 6 * _parameters(recipe.target.model) * count_tokens(recipe) * passes


def count_tokens(recipe: Recipe) -> int:
    """Target tokens of the ground-truth responses: counted if the instructions are prepared, else a quarter of the bytes."""
    instructions = Workspace(recipe.workdir).instructions
    if (instructions / "manifest.json").exists():
        return open_artefact(instructions, "instructions", "tools/prepare_instructions.py").counts["target_tokens"]
    return table_bytes(recipe.data.path) // 4


def _parameters(model: str) -> float:
    return parameter_count(resolve_model(model, "model"))


def parameter_count(directory: Path) -> float:
    """From the size of the weight files, without reading them."""
    files = [path for path in directory.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    return sum(path.stat().st_size for path in files) / _WEIGHT_BYTES


def measured_flops_per_second(size: int = 1024, repeats: int = 4) -> float:
    """What this process's device reaches in a matrix product, times what a transformer usually keeps of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    start = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    product.sum().item()
    return _EFFICIENCY * repeats * 2 * size**3 / (time.perf_counter() - start)
