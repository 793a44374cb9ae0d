"""The choice of a source per example, as small arrays beside the documents: computed again in a second, never captured again.

FUSION/selection/training.safetensors     source int16 [n]; ce_sum float64 [n, S]; response_bytes int64 [n]; available [n, S]
FUSION/selection/inference.safetensors    source int16 [n]; scores float32 [n, S, R]; votes int16 [n, S]; available [n, S]

The header says what the choice was made from and by which rule. Unlike an artefact the file is overwritten when a source, a
reward model or a rule changes.
"""

import json
from collections.abc import Mapping
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
from megatron_fuse.storage import Artefact, sha256_of_bytes, sha256_of_json, temporary_then_rename


@dataclass(frozen=True)
class Selection:
    """source int16 [n]: place in the recipe's sources, -1 = none; arrays: what it was chosen by; sha256: of what and how."""

    source: np.ndarray
    arrays: dict[str, np.ndarray]
    sha256: str


def _path(recipe: Recipe, mode: str) -> Path:
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
    available = np.stack([fact["available"] for fact in facts], 1).astype(bool)  # [n, S]
    parents = {"text": text.sha256, **{source: teachers[source].sha256 for source in recipe.sources}}
    basis = _basis(recipe, mode, parents)
    if mode == "training":
        ce = np.where(available, np.stack([fact["ce_sum"] for fact in facts], 1), np.nan)
        # All sources read the same response; those that left it out have 0.
        response_bytes = np.max([fact["response_bytes"] for fact in facts], 0).astype(np.int64)
        source = min_ce(ce, response_bytes, recipe.selection.training)
        arrays = {"ce_sum": ce, "response_bytes": response_bytes}
    else:
        scores = np.full((*available.shape, len(recipe.reward_models)), np.nan, np.float32)
        for place, name in enumerate(recipe.sources):
            for model, judge in enumerate(recipe.reward_models):
                scores[:, place, model] = load_scores(recipe, name, judge)
        answers = np.where(available, np.stack([fact["answer"] for fact in facts], 1), 0)
        strongest = basis["reward models"].index(basis["strongest"]) if recipe.reward_models else 0
        source, votes = majority_vote(scores, answers, strongest)
        arrays = {"scores": scores, "votes": votes}
    arrays = {"source": source, "available": available.astype(np.uint8), **arrays}
    with temporary_then_rename(_path(recipe, mode)) as temporary:
        save_file(arrays, temporary, {"selection": json.dumps(basis)})
    return Selection(source, arrays, _sha256(basis, source))


def _facts(teacher: Artefact) -> dict[str, np.ndarray]:
    shards = [load_file(path) for path in teacher.files(".examples.safetensors")]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def _sha256(basis: dict[str, Any], source: np.ndarray) -> str:
    # The choice itself counts, not the scores that led to it.
    return sha256_of_bytes(sha256_of_json(basis).encode(), source.tobytes())


def read_selection(recipe: Recipe, mode: str, parents: Mapping[str, str]) -> Selection:
    """The stored choice. parents: sha256 of the text and of every source's rows, by name.

    Raises UserError where there is none, or where it was made for other sources, rules or data than the recipe's.
    """
    path = _path(recipe, mode)
    mend = f"run {BUILT_BY} (it takes a second where the documents are built)"
    if not path.exists():
        raise UserError(f"{path} does not exist: {mend}")
    try:
        with safe_open(path, "np") as file:
            found = json.loads(file.metadata()["selection"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a selection ({error}): {mend}") from error
    for key, want in _basis(recipe, mode, parents).items():
        if found.get(key) != want:
            raise UserError(f"{path} was made with {key} = {found.get(key)!r}, but now it is {want!r}: {mend}")
    return Selection(arrays["source"], arrays, _sha256(found, arrays["source"]))
