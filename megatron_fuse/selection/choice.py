"""The choice of a source per example, as small arrays beside the documents. A new choice takes a second and
no new capture.

FUSION/selection/training-RULE.safetensors    ce_sum float64 [n, S]; lossy [n, S]; response_bytes int64 [n];
                                              response_tokens int32
                                              [n, S]; by average: mixture float64 [n, S], the sources' weights
                                              by winner: answer int64 [n, S], and what the rule for answers
                                              has
FUSION/selection/inference-RULE.safetensors   by vote: scores float32 [n, S, R], NaN = not scored; votes int16
                                              [n, S]
                                              by reference: reference float32 [n, S, 3], its measures; score
                                              float64 [n, S], their mean
either, by by_category                        scores as by vote; category int32 [n]; validation uint8 [n];
                                              category_score float64 [n, S]
both                                          source int16 [n]; available [n, S]; margin float32 [n]; weight
                                              float32 [n]

n examples, S sources in the recipe's order, R reward models (recipe.voting_reward_models). A source that
selection.sources leaves out is not available. RULE is a hash of all options of the choice, so that the files
of several rules can exist side by side. The header holds the inputs and the rule of the choice
(array_file.py). Unlike an artifact the file is overwritten by every build.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY, NAME, TEACHERS, TEXT, fusion_directory
from megatron_fuse.recipe import Margin, Recipe
from megatron_fuse.responses import RESPONSES
from megatron_fuse.scoring.reference import combine, used_weights
from megatron_fuse.scoring.reference_scores import REFERENCE_SCORES
from megatron_fuse.scoring.scores import SCORES
from megatron_fuse.selection.array_file import read_arrays, write_arrays
from megatron_fuse.selection.evidence import answer_rule, read_evidence
from megatron_fuse.selection.margins import (
    category_margin,
    example_weights,
    score_margin,
    training_margin,
    vote_margin,
)
from megatron_fuse.selection.rules import (
    NONE,
    able_answers,
    able_readers,
    best_in_category,
    best_score,
    category_scores,
    inverse_ce,
    majority_vote,
    min_ce,
    random_source,
    winner_if_able,
)
from megatron_fuse.stages import Context, Key, Stage
from megatron_fuse.storage import Artifact, sha256_of_json, sha256_of_parts
from megatron_fuse.storage.artifact import shown

FIX = f"Run {BUILT_BY} (if the documents are already built, this takes a second)."


@dataclass(frozen=True)
class Selection:
    """The choice for n examples in one mode.

    source int16 [n]: index in the recipe's sources, NONE = no source has the advantage.
    weight float32 [n], from 0 to 1: the weight of an example by its margin.
    arrays: all arrays of the file.
    sha256: hash of the choice and of its inputs and rule.
    """

    source: np.ndarray
    weight: np.ndarray
    arrays: dict[str, np.ndarray]
    sha256: str

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], basis: dict[str, Any]) -> "Selection":
        # The hash covers the choice itself, not the scores that led to it.
        chosen = [arrays[name] for name in ("source", "weight", "mixture") if name in arrays]
        parts = [sha256_of_json(basis).encode(), *(array.tobytes() for array in chosen)]
        return cls(arrays["source"], arrays["weight"], arrays, sha256_of_parts(*parts))


def selection_path(recipe: Recipe, mode: str) -> Path:
    rule = sha256_of_json(_rule(recipe, mode))[:8]
    return fusion_directory(recipe) / "selection" / f"{mode}-{rule}.safetensors"


def _margin_options(recipe: Recipe, mode: str) -> Margin | None:
    return recipe.selection.training_margin if mode == "training" else recipe.selection.inference_margin


def _rule(recipe: Recipe, mode: str) -> dict[str, Any]:
    """All options of the recipe that decide the choice in a mode."""
    margin, rule = _margin_options(recipe, mode), getattr(recipe.selection, mode)
    options: dict[str, Any] = {
        "mode": mode,
        "sources": list(recipe.sources),
        "candidates": recipe.candidates,
        "margin": margin and margin.model_dump(),
        "rule": rule,
    }
    if rule == "winner":
        rule = recipe.selection.inference
        options["rule for answers"] = rule
    if rule == "reference":
        options["measures"] = used_weights(recipe.reference)
    elif rule == "vote":
        # "judges" is the recorded name: the rule is part of the hash that names the file.
        options |= {"judges": recipe.voting_reward_models, "strongest": recipe.strongest}
    elif rule == "by_category":
        options["reward_models"] = recipe.voting_reward_models
    elif rule == "random":
        options["seed"] = recipe.seed
    return options


def _basis(recipe: Recipe, mode: str, parents: Mapping[str, str]) -> dict[str, Any]:
    """The rule and the inputs of a selection, without the scores.
    parents: sha256 of the text and of every source's rows."""
    return {**_rule(recipe, mode), "inputs": dict(parents)}


def _parents(recipe: Recipe, mode: str) -> dict[str, tuple[Stage, Key]]:
    """The text and the sources' rows; if answers decide, also their scores, and the answers if they are
    not rows.
    """
    parents: dict[str, tuple[Stage, Key]] = {"text": (TEXT, ())}
    parents |= {source: (TEACHERS, (source, mode)) for source in recipe.sources}
    rule = answer_rule(recipe, mode)
    if mode == "training" and recipe.selection.training == "winner":
        parents |= {f"answers of {source}": (RESPONSES, (source,)) for source in recipe.sources}
    if rule in ("vote", "by_category"):
        pairs = [
            (source, reward_model)
            for source in recipe.sources
            for reward_model in recipe.voting_reward_models
        ]
        parents |= {
            f"scores of {source} by {reward_model}": (SCORES, (source, reward_model))
            for source, reward_model in pairs
        }
    if rule == "reference":
        parents |= {
            f"reference scores of {source}": (REFERENCE_SCORES, (source,)) for source in recipe.sources
        }
    return parents


def _state(context: Context, mode: str) -> str:
    """`done` if there is a choice by the recipe's rule.

    Every build makes it again, because its scores may have changed.
    """
    return "done" if selection_path(context.recipe, mode).exists() else "to do"


SELECTION = Stage(
    name=NAME,
    recorded_as="selection",
    command=BUILT_BY,
    keys=lambda recipe: [(mode,) for mode in recipe.modes_with_teacher],
    directory=selection_path,
    parents=_parents,
    state=_state,
    always=True,
)


def select(context: Context, mode: str, text: Artifact, teachers: Mapping[str, Artifact]) -> Selection:
    """Chooses a source for every example in one mode and writes the result.

    Raises UserError if scores are missing.
    """
    recipe = context.recipe
    example_arrays = [_example_arrays(teachers[source]) for source in recipe.sources]
    evidence = read_evidence(context, mode, len(example_arrays[0]["available"]))
    arrays = choose(recipe, mode, example_arrays, evidence)
    basis = _basis(
        recipe, mode, {"text": text.sha256, **{name: teachers[name].sha256 for name in recipe.sources}}
    )
    write_arrays(selection_path(recipe, mode), arrays, basis)
    return Selection.of(arrays, basis)


def choose(
    recipe: Recipe,
    mode: str,
    example_arrays: Sequence[Mapping[str, np.ndarray]],
    evidence: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The arrays of a selection.

    example_arrays: for each source the arrays of all examples that its rows come with.
    evidence: see read_evidence.
    """
    available = np.stack([each["available"] for each in example_arrays], 1).astype(bool)  # [n, S]
    available &= _candidates(recipe)
    if mode == "training":
        arrays = _of_ground_truth(recipe, example_arrays, available, evidence)
    else:
        answers = np.where(available, np.stack([each["answer"] for each in example_arrays], 1), 0)
        arrays = {**evidence, **_of_answers(recipe, answers, evidence)}
    weight = example_weights(arrays["margin"], _margin_options(recipe, mode))
    return {"available": available.astype(np.uint8), **arrays, "weight": weight}


def _candidates(recipe: Recipe) -> np.ndarray:
    """bool [S]: the sources that selection chooses between."""
    return np.isin(list(recipe.sources), recipe.candidates)


def _of_ground_truth(
    recipe: Recipe,
    example_arrays: Sequence[Mapping[str, np.ndarray]],
    available: np.ndarray,
    evidence: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The choice in the training mode."""
    ce = np.where(available, np.stack([each["ce_sum"] for each in example_arrays], 1), np.nan)
    lossy = np.stack([each["lossy"] for each in example_arrays], 1).astype(bool)
    # All sources read the same response. A source that left it out has 0 bytes.
    response_bytes = np.max([each["response_bytes"] for each in example_arrays], 0).astype(np.int64)
    response_tokens = np.stack([each["response_tokens"] for each in example_arrays], 1)
    able, rule = able_readers(ce, lossy), recipe.selection.training
    if rule == "winner":
        chosen = _by_winner(recipe, able, evidence)
    elif rule == "by_category":
        chosen = {**evidence, **_by_category(recipe, able, **evidence)}
    else:
        if rule == "random":
            chosen = {"source": random_source(able, (recipe.seed, 0))}
        else:
            # The source of a mixture is the one with the largest weight, and so with the least cross-entropy.
            # Ties go to the first.
            compared = "sum" if rule == "average" else rule
            counts = {"response_bytes": response_bytes, "response_tokens": response_tokens}
            chosen = {"source": min_ce(ce, lossy, **counts, rule=compared)}
            chosen |= {"mixture": inverse_ce(ce, lossy)} if rule == "average" else {}
        chosen["margin"] = training_margin(ce, lossy, response_bytes, chosen["source"])
    return {
        **chosen,
        "ce_sum": ce,
        "lossy": lossy.astype(np.uint8),
        "response_bytes": response_bytes,
        "response_tokens": response_tokens,
    }


def _by_winner(recipe: Recipe, able: np.ndarray, evidence: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The source whose own answer wins, by the rule for answers, also teaches the ground truth."""
    answers = np.where(_candidates(recipe), evidence["answer"], 0)
    scores = {name: array for name, array in evidence.items() if name != "answer"}
    won = _of_answers(recipe, answers, scores)
    source = winner_if_able(won["source"], able)
    margin = np.where(source == NONE, np.nan, won["margin"]).astype(np.float32)
    return {**evidence, **won, "source": source, "margin": margin}


def _of_answers(
    recipe: Recipe, answers: np.ndarray, evidence: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The choice between the sources' answers. answers int [n, S]: see able_answers."""
    rule = recipe.selection.inference
    if rule == "by_category":
        able = able_answers(evidence["scores"], answers)
        return _by_category(recipe, able, **evidence)
    rules: dict[str, Callable[..., dict[str, np.ndarray]]] = {
        "vote": _by_vote,
        "reference": _by_reference,
        "random": _by_chance,
    }
    return rules[rule](recipe, answers, **evidence)


def _by_category(
    recipe: Recipe, able: np.ndarray, scores: np.ndarray, category: np.ndarray, validation: np.ndarray
) -> dict[str, np.ndarray]:
    # Sources that cannot be chosen do not set the scale of the scores, or the lowest of them.
    of_candidates = np.where(_candidates(recipe)[:, None], scores, np.nan)
    means = category_scores(of_candidates, category, validation == 0)
    source = best_in_category(means, able)
    return {"source": source, "margin": category_margin(means, able, source), "category_score": means}


def _by_vote(recipe: Recipe, answers: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    strongest = recipe.voting_reward_models.index(recipe.strongest) if recipe.strongest else 0
    source, votes = majority_vote(scores, answers, strongest)
    return {"source": source, "margin": vote_margin(scores, votes, answers, source), "votes": votes}


def _by_reference(recipe: Recipe, answers: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    score = combine(reference, recipe.reference)
    source = best_score(score, answers)
    return {"source": source, "margin": score_margin(score, answers, source), "score": score}


def _by_chance(recipe: Recipe, answers: np.ndarray) -> dict[str, np.ndarray]:
    source = random_source(answers != 0, (recipe.seed, 1))
    return {"source": source, "margin": np.where(source == NONE, np.nan, 0).astype(np.float32)}


def _example_arrays(teacher: Artifact) -> dict[str, np.ndarray]:
    shards = [load_file(teacher.checked(path)) for path in teacher.files(".examples.safetensors")]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def read_selection(recipe: Recipe, mode: str, parents: Mapping[str, str]) -> Selection:
    """The stored choice. parents: sha256 of the text and of every source's rows, by name.

    Raises UserError if it is missing or damaged, or if it was made for other sources, rules or data than the
    recipe's.
    """
    path = selection_path(recipe, mode)
    if not path.exists():
        raise UserError(f"{path} does not exist, but must hold the choice by {_rule(recipe, mode)}. {FIX}")
    arrays, basis = read_arrays(path, FIX)
    for key, want in _basis(recipe, mode, parents).items():
        have = basis.get(key)
        # The message names the one input that differs, not all inputs.
        if isinstance(have, dict) and isinstance(want, dict) and have != want:
            inner = next(name for name in [*want, *have] if have.get(name) != want.get(name))
            key, have, want = f"{key}.{inner}", have.get(inner), want.get(inner)
        if have != want:
            raise UserError(f"{path} was made with {key} = {shown(have)}, but now it is {shown(want)}. {FIX}")
    return Selection.of(arrays, basis)
