"""Scores all answers by every reward model that the recipe uses, or against the ground truth.

    megatron-fuse score --recipe examples/quickstart/recipe.yaml [--source NAME ...] [--reward-model NAME ...]
    megatron-fuse score --recipe ... --reference    # BLEU, ROUGE-L and BERTScore against the ground truth
    torchrun --nproc-per-node 8 -m megatron_fuse.cli score --recipe ...    # rank r takes every 8th shard
    megatron-fuse score --recipe ... --claim    # any number of these, on any machines over one file system

Writes WORKDIR/scores/NAME/REWARD_MODEL with one float32 for each example, or WORKDIR/scores/NAME/reference
with three. NAME is a source, or `target` if its reward orders the examples. After an interruption, the same
command continues where it stopped. With `server` a vLLM or SGLang server gives the rewards. If the
recipe has `scores: FILE` for a reward model, the file is read instead.
"""

import argparse

from megatron_fuse.cli.claim_arguments import add_claim_arguments, take_claims
from megatron_fuse.recipe import REFERENCE, Recipe, add_recipe_arguments, recipe_from_arguments
from megatron_fuse.recipe.backends import SCORE_BACKENDS
from megatron_fuse.recipe.lookup import answering_options
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_claim_arguments(parser, may_leave=True)
    parser.add_argument(
        "--source",
        action="append",
        metavar="NAME",
        help="score only the answers of this model; can be given several times",
    )
    parser.add_argument(
        "--reward-model",
        action="append",
        metavar="NAME",
        help="score only with this reward model; can be given several times",
    )
    parser.add_argument("--reference", action="store_true", help="score against the ground truth")
    parser.add_argument(
        "--backend",
        choices=SCORE_BACKENDS,
        help="hf: run the reward model in this process. server: ask the server of "
        "reward_models.NAME.server. file: read the file that reward_models.NAME.scores "
        "names. The recipe decides; this option is an error if the recipe decides otherwise",
    )


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from_arguments(arguments)
    take_claims(arguments)
    with importing():
        from megatron_fuse.pipeline.idle_processes import warn_of_idle_processes
        from megatron_fuse.scoring.reference_scores import score_against_reference
        from megatron_fuse.scoring.scores import require_backend, score_responses
        from megatron_fuse.stages import Context
    context = Context(recipe)
    warn_of_idle_processes(context)
    asked = [*(arguments.reward_model or []), *([REFERENCE] if arguments.reference else [])]
    wanted = _wanted(recipe, arguments.source, asked)
    if not wanted:
        say("neither the inference mode nor the order of the examples needs any score: name a --reward-model")
    for scorer, sources in wanted.items():
        if arguments.backend and scorer != REFERENCE:
            require_backend(recipe, scorer, arguments.backend)
        artifacts = (
            score_against_reference(context, sources)
            if scorer == REFERENCE
            else score_responses(context, scorer, sources)
        )
        for artifact in artifacts:
            say(artifact.summary)


def _wanted(recipe: Recipe, sources: list[str] | None, asked: list[str]) -> dict[str, list[str]]:
    """Scorer -> names of the models whose answers it scores.

    Without sources and scorers, these are the recipe's. Raises UserError for a name that the recipe does not
    have.
    """
    for source in sources or []:
        answering_options(recipe, source)  # raises UserError for an unknown name
    if asked:
        return {scorer: sources or list(recipe.answering or recipe.sources) for scorer in asked}
    wanted: dict[str, list[str]] = {}
    for source in sources or recipe.scorers:
        for scorer in recipe.scorers.get(source, recipe.reward_models):
            wanted.setdefault(scorer, []).append(source)
    return wanted
