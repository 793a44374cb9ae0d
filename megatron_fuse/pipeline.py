"""The stages of a recipe in order: which artefacts each one makes, what is done, and roughly what the rest will cost.

The only place that knows the whole road. It runs nothing: tools/run_recipe.py starts the commands.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fuse.advantage.scores import plan_scores
from megatron_fuse.capture import plan_capture
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data import modes_with_teacher
from megatron_fuse.fusion_data.layout import fusion_directory, teacher_directory, text_directory
from megatron_fuse.fusion_data.text import plan_text
from megatron_fuse.instructions import plan_instructions
from megatron_fuse.instructions.tables import table_bytes
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import plan_responses
from megatron_fuse.sources.huggingface import resolve_model
from megatron_fuse.storage import Plan, Workspace, completed, open_artefact
from megatron_fuse.target import read_target

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


def check_files(recipe: Recipe) -> None:
    """Refuses a recipe whose data or models are missing, all at once, or whose target cannot be trained as it says."""
    problems = []
    try:
        table_bytes(recipe.data.path)
    except UserError as error:
        problems.append(str(error))
    named = {"target": recipe.target}
    named |= {f"sources.{name}": options for name, options in recipe.sources.items()}
    named |= {f"reward_models.{name}": options for name, options in recipe.reward_models.items()}
    for key, options in named.items():
        try:
            resolve_model(options.model, f"{key}.model")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n       ".join(problems))
    read_target(recipe)


def data_stages(recipe: Recipe) -> list[Stage]:
    """The stages before training, in order. Captures, answers and votes are made only for the modes that the phases use."""
    workspace = Workspace(recipe.workdir)
    tokens = count_tokens(recipe)
    parameters = {name: parameter_count(options.model) for name, options in recipe.sources.items()}
    judges = {name: parameter_count(options.model) for name, options in recipe.reward_models.items()}
    modes = modes_with_teacher(recipe)
    inference = "inference" in modes
    # About 6 of 10 entries are kept of real text by the default filter. Rows beside the entries: ids, places, sums.
    captured, fused = 8 * 0.6 * recipe.capture.top_k + 26, 4 * 0.6 * recipe.capture.top_k + 2

    def per_source_and_mode(make: Callable[[str, str], Work]) -> list[Work]:
        return [make(source, mode) for source in recipe.sources for mode in modes]

    responses = [
        Work(
            f"responses/{source}",
            workspace.responses(source),
            lambda source=source: plan_responses(recipe, source),
            flops=2 * parameters[source] * tokens,
            disk=5 * tokens,
        )
        for source in recipe.sources
    ]
    scores = [
        Work(
            f"scores/{source}/{judge}",
            workspace.scores(source, judge),
            lambda source=source, judge=judge: plan_scores(recipe, source, judge),
            flops=2 * judges[judge] * tokens,
        )
        for source in recipe.sources
        for judge in recipe.reward_models
    ]
    captures = per_source_and_mode(
        lambda source, mode: Work(
            f"captures/{source}/{mode}",
            workspace.captures(source, mode),
            lambda: plan_capture(recipe, source, mode),
            flops=0 if mode in recipe.sources[source].captures else 2 * parameters[source] * tokens,
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
        *([Stage("responses", "tools/generate_responses.py", responses)] if inference else []),
        *([Stage("scores", "tools/score_responses.py", scores)] if inference and scores else []),
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


def training_flops(recipe: Recipe) -> float:
    """Forward and backward over all phases: 6 operations per parameter and token (Kaplan et al., arXiv 2001.08361)."""
    passes = sum(phase.epochs * ((phase.inference.weight > 0) + (phase.training.weight > 0)) for phase in recipe.phases)
    return 6 * parameter_count(recipe.target.model) * count_tokens(recipe) * passes


def count_tokens(recipe: Recipe) -> int:
    """Target tokens of the ground-truth responses: counted if the instructions are prepared, else a quarter of the bytes."""
    instructions = Workspace(recipe.workdir).instructions
    if (instructions / "manifest.json").exists():
        return open_artefact(instructions, "instructions", "tools/prepare_instructions.py").counts["target_tokens"]
    return table_bytes(recipe.data.path) // 4


def parameter_count(model: str) -> float:
    """From the size of the weight files, without reading them."""
    directory = resolve_model(model, "model")
    files = [path for suffix in ("*.safetensors", "*.bin") for path in directory.glob(suffix)]
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
