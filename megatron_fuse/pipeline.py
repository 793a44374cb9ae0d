"""The stages of a recipe in order: which artefacts each one makes, what is done, and roughly what the rest will cost (estimates.py).

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
from megatron_fuse.estimates import Amounts, count_parameters, training_tokens
from megatron_fuse.fusion_data import FusionDataset, modes_with_teacher
from megatron_fuse.fusion_data.layout import fusion_directory, teacher_directory, text_directory
from megatron_fuse.fusion_data.text import plan_text
from megatron_fuse.instructions import plan_instructions
from megatron_fuse.instructions.tables import table_bytes
from megatron_fuse.recipe import REFERENCE, Recipe
from megatron_fuse.responses import backend_of, plan_responses
from megatron_fuse.sources.huggingface import answering_options, resolve_model
from megatron_fuse.storage import Plan, Workspace, completed
from megatron_fuse.target import check_target_weights, checkpoint_directory, read_target
from megatron_fuse.training.checkpoint_files import LATEST
from megatron_fuse.training.schedule import make_schedule

# Share of a bare matrix product's rate that a transformer's forward pass reaches; only for estimates.
_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Work:
    """One artefact of a stage."""

    name: str
    directory: Path
    plan: Callable[[], Plan] | None = None  # None: a manifest in the directory is all that can be asked for
    flops: Callable[[Amounts], float] = lambda _: 0.0
    disk: Callable[[Amounts], float] = lambda _: 0.0  # bytes

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
    modes = modes_with_teacher(recipe)
    # About 6 of 10 entries are kept of real text by the default filter. Rows beside the entries: ids, places, sums.
    captured, fused = 8 * 0.6 * recipe.capture.top_k + 26, 4 * 0.6 * recipe.capture.top_k + 2

    def per_source_and_mode(make: Callable[[str, str], Work]) -> list[Work]:
        return [make(source, mode) for source in recipe.sources for mode in modes]

    responses = [
        Work(
            f"responses/{name}",
            workspace.responses(name),
            partial(plan_responses, recipe, name),
            flops=partial(_response_flops, recipe, name),
            disk=lambda amounts: 5 * amounts.answer_tokens,
        )
        for name in recipe.answering
    ]
    scores = [
        Work(
            f"scores/{name}/{scorer}",
            workspace.scores(name, scorer),
            partial(_plan_scores, recipe, name, scorer),
            flops=partial(_scoring_flops, recipe, scorer),
        )
        for name, scorers in recipe.scorers.items()
        for scorer in scorers
    ]
    captures = per_source_and_mode(
        lambda source, mode: Work(
            f"captures/{source}/{mode}",
            workspace.captures(source, mode),
            lambda: plan_capture(recipe, source, mode),
            flops=partial(_capture_flops, recipe, source, mode),
            disk=lambda amounts: captured * amounts.learned(mode),
        )
    )
    fusion_name = f"fusion/{fusion_directory(recipe).name}"
    teachers = per_source_and_mode(
        lambda source, mode: Work(
            f"{fusion_name}/teachers/{source}/{mode}",
            teacher_directory(recipe, source, mode),
            disk=lambda amounts: fused * amounts.learned(mode),
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
                Work(
                    f"{fusion_name}/text",
                    text_directory(recipe),
                    lambda: plan_text(recipe),
                    disk=lambda amounts: 3 * amounts.read("training"),
                ),
                *teachers,
            ],
        ),
    ]


def _plan_scores(recipe: Recipe, name: str, scorer: str) -> Plan:
    return plan_reference_scores(recipe, name) if scorer == REFERENCE else plan_scores(recipe, name, scorer)


# Two operations per parameter and token of a forward pass, six of forward and backward (Kaplan et al., arXiv 2001.08361).
def _response_flops(recipe: Recipe, name: str, amounts: Amounts) -> float:
    """A model in process reads every prompt and writes its answer. Answers of a server or a file cost nothing here."""
    if backend_of(recipe, name) != "hf":
        return 0.0
    return 2 * _parameters(answering_options(recipe, name).model) * amounts.read("inference")


def _scoring_flops(recipe: Recipe, scorer: str, amounts: Amounts) -> float:
    """A judge reads every answer once; BERTScore's encoder the ground truth as well. Scores from a file cost nothing."""
    if scorer == REFERENCE:
        encoder = recipe.reference.bertscore_model
        return 2 * _parameters(encoder) * (amounts.answer_tokens + amounts.response_tokens) if encoder else 0.0
    judge = recipe.reward_models[scorer]
    return 0.0 if judge.scores else 2 * count_parameters(find_judge(judge, scorer).weights) * amounts.read("inference")


def _capture_flops(recipe: Recipe, source: str, mode: str, amounts: Amounts) -> float:
    options = recipe.sources[source]
    return 0.0 if mode in options.captures else 2 * _parameters(options.model) * amounts.read(mode)


def training_flops(recipe: Recipe, amounts: Amounts) -> float:
    """Over all phases, as far as train_iters lets them go."""
    return 6 * _parameters(recipe.target.model) * training_tokens(recipe, amounts)


def _parameters(model: str) -> float:
    return count_parameters(resolve_model(model, "model"))


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
