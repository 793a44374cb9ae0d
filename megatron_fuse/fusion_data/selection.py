"""The choice of a source per example, as small arrays beside the documents: computed again in a second, never captured again.

FUSION/selection/training.safetensors     source int16 [n]; available, lossy [n, S]; ce_sum float64 [n, S];
                                          response_bytes int64 [n]; response_tokens int32 [n, S]
FUSION/selection/inference.safetensors    source int16 [n]; available [n, S]; scores float32 [n, S, R]; votes int16 [n, S]

The header says what the choice was made from and by which rule. Unlike an artefact the file is overwritten when a source, a
reward model or a rule changes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from megatron_fuse.advantage.scores import load_scores
from megatron_fuse.advantage.selection import majority_vote, min_ce
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY, fusion_directory
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format
from megatron_fuse.storage import Artefact, sha256_of_bytes, sha256_of_json, temporary_then_rename

MEND = f"run {BUILT_BY} (it takes a second where the documents are built)"


@dataclass(frozen=True)
class Selection:
    """source int16 [n]: place in the recipe's sources, -1 = none; arrays: what it was chosen by; sha256: of what and how."""

    source: np.ndarray
    arrays: dict[str, np.ndarray]
    sha256: str


def selection_path(recipe: Recipe, mode: str) -> Path:
    return fusion_directory(recipe) / "selection" / f"{mode}.safetensors"


def _basis(recipe: Recipe, mode: str, parents: Mapping[str, str]) -> dict[str, Any]:
    """What a selection is made from, but for the scores: parents are the sha256 of the text and of every source's rows."""
    rules = recipe.selection
    basis: dict[str, Any] = {"mode": mode, "sources": list(recipe.sources), "inputs": dict(parents)}
    if mode == "training":
        return {**basis, "rule": rules.training}
    models = list(recipe.reward_models)
    return {
        **basis,
        "rule": rules.inference,
        "reward models": models,
        "strongest": rules.strongest or (models[0] if models else None),
    }


def select(recipe: Recipe, mode: str, text: Artefact, teachers: Mapping[str, Artefact]) -> Selection:
    """Chooses a source for every example in one mode and writes the result. Raises UserError where scores are missing."""
    facts = [_facts(teachers[source]) for source in recipe.sources]
    scores = read_scores(recipe, len(facts[0]["available"])) if mode == "inference" else None
    arrays = choose(recipe, mode, facts, scores)
    basis = _basis(recipe, mode, {"text": text.sha256, **{name: teachers[name].sha256 for name in recipe.sources}})
    with temporary_then_rename(selection_path(recipe, mode)) as temporary:
        save_file(arrays, temporary, {"selection": json.dumps(basis)})
    return Selection(arrays["source"], arrays, _sha256(basis, arrays["source"]))


def choose(
    recipe: Recipe, mode: str, facts: Sequence[Mapping[str, np.ndarray]], scores: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a selection. facts: what each source's rows say of all examples; scores [n, S, R]: of the inference mode."""
    available = np.stack([fact["available"] for fact in facts], 1).astype(bool)  # [n, S]
    if mode == "training":
        ce = np.where(available, np.stack([fact["ce_sum"] for fact in facts], 1), np.nan)
        # All sources read the same response; those that left it out have 0.
        response_bytes = np.max([fact["response_bytes"] for fact in facts], 0).astype(np.int64)
        response_tokens = np.stack([fact["response_tokens"] for fact in facts], 1)
        lossy = np.stack([fact["lossy"] for fact in facts], 1).astype(bool)
        source = min_ce(
            ce,
            lossy,
            response_bytes=response_bytes,
            response_tokens=response_tokens,
            rule=recipe.selection.training,
        )
        arrays = {
            "ce_sum": ce,
            "lossy": lossy.astype(np.uint8),
            "response_bytes": response_bytes,
            "response_tokens": response_tokens,
        }
    else:
        models = list(recipe.reward_models)
        strongest = models.index(recipe.selection.strongest or models[0]) if models else 0
        answers = np.where(available, np.stack([fact["answer"] for fact in facts], 1), 0)
        source, votes = majority_vote(scores, answers, strongest)
        arrays = {"scores": scores, "votes": votes}
    return {"source": source, "available": available.astype(np.uint8), **arrays}


def read_scores(recipe: Recipe, examples: int) -> np.ndarray:
    """float32 [n, S, R]"""
    scores = np.full((examples, len(recipe.sources), len(recipe.reward_models)), np.nan, np.float32)
    for model, (judge, options) in enumerate(recipe.reward_models.items()):
        chat = load_format(options, f"reward_models.{judge}")
        for place, name in enumerate(recipe.sources):
            scores[:, place, model] = load_scores(recipe, name, judge, chat)
    return scores


def _facts(teacher: Artefact) -> dict[str, np.ndarray]:
    shards = [load_file(teacher.checked(path)) for path in teacher.files(".examples.safetensors")]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def _sha256(basis: dict[str, Any], source: np.ndarray) -> str:
    # The choice itself counts, not the scores that led to it.
    return sha256_of_bytes(sha256_of_json(basis).encode(), source.tobytes())


def read_selection(recipe: Recipe, mode: str, parents: Mapping[str, str]) -> Selection:
    """The stored choice. parents: sha256 of the text and of every source's rows, by name.

    Raises UserError where there is none, or where it was made for other sources, rules or data than the recipe's.
    """
    path = selection_path(recipe, mode)
    if not path.exists():
        raise UserError(f"{path} does not exist: {MEND}")
    try:
        with safe_open(path, "np") as file:
            found = json.loads(file.metadata()["selection"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a selection ({error}): {MEND}") from error
    for key, want in _basis(recipe, mode, parents).items():
        if found.get(key) != want:
            raise UserError(f"{path} was made with {key} = {found.get(key)!r}, but now it is {want!r}: {MEND}")
    return Selection(arrays["source"], arrays, _sha256(found, arrays["source"]))
