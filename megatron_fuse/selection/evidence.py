"""What a selection compares of the sources' answers: scores, categories, and which answers are identical."""

import numpy as np

from megatron_fuse.fusion_data.answers import EMPTY_ANSWER, answer_key
from megatron_fuse.instructions import INSTRUCTIONS, load_examples, require_categories
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.scoring.reference_scores import load_reference_scores
from megatron_fuse.scoring.scores import load_scores
from megatron_fuse.stages import Context


def answer_rule(recipe: Recipe, mode: str) -> str | None:
    """The rule that compares the sources' answers in a mode.

    None if cross-entropies decide, or chance on them.
    """
    if mode == "inference":
        return recipe.selection.inference
    return {"winner": recipe.selection.inference, "by_category": "by_category"}.get(recipe.selection.training)


def read_evidence(context: Context, mode: str, examples: int) -> dict[str, np.ndarray]:
    """What decides between the sources' answers, if answers decide in this mode.

    By the rule `vote`: `scores` float32 [n, S, R] of the reward models. By the rule `reference`: the measures
    `reference` float32 [n, S, 3]. By the rule `by_category`: `scores`, the number of each example's
    `category` int32 [n], and whether it is a `validation` example, whose scores do not count. By the rule
    `random`: nothing. If the winner teaches the ground truth: also `answer` int64 [n, S], equal numbers for
    identical answers. Raises UserError if scores are missing or were made by other options, or if no example
    has a category.
    """
    recipe, rule = context.recipe, answer_rule(context.recipe, mode)
    sources, evidence = list(recipe.sources), {}
    if rule == "reference":
        evidence["reference"] = np.stack([load_reference_scores(context, source) for source in sources], 1)
    if rule in ("vote", "by_category"):
        scores = np.full((examples, len(sources), len(recipe.voting_reward_models)), np.nan, np.float32)
        for r, reward_model in enumerate(recipe.voting_reward_models):
            for s, source in enumerate(sources):
                scores[:, s, r] = load_scores(context, source, reward_model)
        evidence["scores"] = scores
    if rule == "by_category":
        evidence |= _categories(context)
    if mode == "training" and recipe.selection.training == "winner":
        evidence["answer"] = np.stack([_answers(context, source) for source in sources], 1)
    return evidence


def evidence_shapes(recipe: Recipe, mode: str, examples: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of read_evidence, by name."""
    rule, sources = answer_rule(recipe, mode), len(recipe.sources)
    shapes: dict[str, tuple[int, ...]] = {}
    if rule == "reference":
        shapes["reference"] = (examples, sources, 3)
    if rule in ("vote", "by_category"):
        shapes["scores"] = (examples, sources, len(recipe.voting_reward_models))
    if rule == "by_category":
        shapes |= {"category": (examples,), "validation": (examples,)}
    if mode == "training" and recipe.selection.training == "winner":
        shapes["answer"] = (examples, sources)
    return shapes


def _categories(context: Context) -> dict[str, np.ndarray]:
    """`category` int32 [n]: the number of each example's category, in the order of first appearance, and
    `validation` uint8 [n]: whether it is a validation example.

    Examples without a category are one category.
    """
    examples = load_examples(context.open(INSTRUCTIONS))
    require_categories(context.recipe, examples)
    numbers: dict[str | None, int] = {}
    categories = [numbers.setdefault(example.category, len(numbers)) for example in examples]
    validation = [example.is_validation for example in examples]
    return {"category": np.array(categories, np.int32), "validation": np.array(validation, np.uint8)}


def _answers(context: Context, source: str) -> np.ndarray:
    """int64 [n]: equal numbers for identical answers, EMPTY_ANSWER for an empty one."""
    shards = response_shards(context.open(RESPONSES, source))
    texts = [response.response for shard in shards for response in shard]
    return np.array([answer_key(text) if text.strip() else EMPTY_ANSWER for text in texts], np.int64)
