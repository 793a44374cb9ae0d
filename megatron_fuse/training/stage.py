"""Training and export as stages of the pipeline.

Their commands find out by themselves whether anything is left to do.
"""

from megatron_fuse.dataset import FusionDataset, data_parents
from megatron_fuse.errors import UserError
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Amounts, Context, Stage
from megatron_fuse.target import target_directory
from megatron_fuse.training.checkpoint_files import LATEST
from megatron_fuse.training.directories import checkpoint_directory, export_directory
from megatron_fuse.training.schedule import make_schedule


def reached_step(recipe: Recipe) -> int | None:
    """The step of the newest checkpoint; None if there is none."""
    tracker = checkpoint_directory(recipe) / LATEST
    return int(tracker.read_text()) if tracker.exists() else None


def require_whole_training(recipe: Recipe) -> None:
    """Raises UserError if training ended early, at a signal or by --exit-interval:
    such a model must not be exported."""
    wanted = make_schedule(recipe, len(FusionDataset(recipe).train)).last_step(recipe.training.train_iters)
    reached = reached_step(recipe) or 0
    if reached < wanted:
        raise UserError(
            f"training stopped at step {reached} of {wanted}. Run this command again to continue."
        )


def training_tokens(recipe: Recipe, amounts: Amounts) -> float:
    """Tokens that the target reads in training, with the prompts,
    up to the step at which train_iters ends the training."""
    training_examples = amounts.examples - amounts.validation_examples
    schedule = make_schedule(recipe, training_examples)
    steps = schedule.last_step(recipe.training.train_iters)
    samples = min(steps * recipe.training.global_batch_size, schedule.total_samples)
    read = 0.0
    for index, phase in enumerate(recipe.phases):
        phase_samples = min(samples, schedule.phase_samples(index))
        samples -= phase_samples
        modes = ["inference"] * phase.inference.is_used + ["training"] * phase.training.is_used
        read += phase_samples * sum(amounts.read(mode) for mode in modes) / amounts.examples
    return read


def training_flops(context: Context, amounts: Amounts) -> float:
    """Six operations per parameter and token, forward and backward (Kaplan et al., arXiv 2001.08361)."""
    recipe = context.recipe
    return 6 * count_parameters(target_directory(recipe)) * training_tokens(recipe, amounts)


def _training_state(context: Context) -> str:
    step = reached_step(context.recipe)
    return "to do" if step is None else f"at step {step}"


TRAINING = Stage(
    name="training",
    recorded_as="training",
    command="python -m megatron_fuse.pretrain",
    keys=lambda _: [()],
    directory=lambda recipe: checkpoint_directory(recipe).parent,
    parents=data_parents,
    flops=training_flops,
    state=_training_state,
    always=True,
)

EXPORT = Stage(
    name="export",
    recorded_as="export",
    command="megatron-fuse export",
    keys=lambda _: [()],
    directory=export_directory,
    parents=lambda _: {"checkpoint": (TRAINING, ())},
    state=lambda context: "done" if export_directory(context.recipe).exists() else "to do",
    always=True,
    one_process=True,
)
