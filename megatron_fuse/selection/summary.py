"""One-line summaries of the selections and of the curriculum, for the commands that build and run."""

from collections.abc import Mapping

import numpy as np

from megatron_fuse.recipe import TARGET, Recipe
from megatron_fuse.selection.choice import Selection
from megatron_fuse.selection.curriculum import GT_TOKENS, TARGET_REWARD
from megatron_fuse.selection.rules import NONE


def rule_lines(recipe: Recipe) -> list[str]:
    """The recipe's rules of selection and order, as lines to print before anything is built."""
    rules = {"inference": _inference_rule(recipe), "training": _training_rule(recipe)}
    lines = [f"advantage in {mode} mode: {rules[mode]}" for mode in recipe.modes_with_teacher]
    return [*lines, f"order of the examples: {recipe.schedule.order}"]


def _training_rule(recipe: Recipe) -> str:
    rule = recipe.selection.training
    words = {
        "random": "chance",
        "average": "all sources mixed, by their cross-entropies",
        "winner": f"the winner of the answers ({_inference_rule(recipe)})",
        "by_category": f"best mean score in the category, by {', '.join(recipe.voting_reward_models)}",
    }
    return words.get(rule, f"least cross-entropy ({rule})")


def _inference_rule(recipe: Recipe) -> str:
    if recipe.selection.inference == "reference":
        return "best score against the ground truth"
    if recipe.selection.inference == "random":
        return "chance"
    if recipe.selection.inference == "by_category":
        return f"best mean score in the category, by {', '.join(recipe.voting_reward_models)}"
    if len(recipe.voting_reward_models) > 1:
        return f"vote of {', '.join(recipe.voting_reward_models)}; ties go to {recipe.strongest}"
    return f"best score by {recipe.strongest}" if recipe.voting_reward_models else "the only source"


def selection_line(recipe: Recipe, mode: str, selection: Selection) -> str:
    """The share of examples that each source wins,
    and the effect of the margin on those with a small lead."""
    examples = len(selection.source)
    names = {index: name for index, name in enumerate(recipe.sources) if name in recipe.candidates} | {
        NONE: "none"
    }
    wins = ((name, int((selection.source == index).sum())) for index, name in names.items())
    line = f"{mode} mode, advantage of " + ", ".join(
        f"{name}: {won:,} ({won / examples:.1%})" for name, won in wins
    )
    margin = recipe.selection.training_margin if mode == "training" else recipe.selection.inference_margin
    if margin is None:
        return line
    below = int((selection.weight < 1).sum())
    fate = f"count {margin.weight:g}" if margin.weight else "are dropped"
    return f"{line}; {below:,} ({below / examples:.1%}) are won by less than {margin.at_least:g} and {fate}"


def curriculum_line(recipe: Recipe, measures: Mapping[str, np.ndarray]) -> str:
    """The order of the examples and the range of their measures.
    measures: the arrays of the curriculum's file."""
    tokens = measures[GT_TOKENS]
    line = (
        f"order of the examples: {recipe.schedule.order}; ground truth of {tokens.min():,} to "
        f"{tokens.max():,} target tokens, median {np.median(tokens):,.0f}"
    )
    if TARGET_REWARD not in measures:
        return line
    rewards = measures[TARGET_REWARD]
    scored = rewards[~np.isnan(rewards)]
    extent = (
        f"{scored.min():.3g} to {scored.max():.3g}, median {np.median(scored):.3g}" if len(scored) else "none"
    )
    return (
        f"{line}; reward of {recipe.target_as_source or TARGET}'s answers by {recipe.strongest}: {extent}, "
        f"{len(rewards) - len(scored):,} not scored"
    )
