"""Reward models as the judge: each votes for the answer with the higher score, and most votes win.

OUTPUT/scores/REWARD_MODEL.jsonl     every score, by the hash of its conversation (records.py)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.open_ended.answers import Answers, conversation
from megatron_fuse.evaluation.open_ended.judgements import (
    Judgement,
    PairwiseComparison,
    decided_without_judge,
)
from megatron_fuse.evaluation.open_ended.records import open_records
from megatron_fuse.evaluation.results import MODEL
from megatron_fuse.huggingface.reward_models import load_reward_model_format, reward_model_fingerprint
from megatron_fuse.progress import Progress, log_complete
from megatron_fuse.recipe import Recipe, RewardModelOptions
from megatron_fuse.scoring.conversations import score_conversations
from megatron_fuse.scoring.reward_models import RewardModel, load_reward_model
from megatron_fuse.storage import sha256_of_json

_GROUPS = 64  # answers to so many turns are scored between two writes


@dataclass(frozen=True)
class RewardModels:
    """The reward models that vote. strongest: whose score decides between equal numbers of votes."""

    options: Mapping[str, RewardModelOptions]
    strongest: str

    def settings(self) -> dict[str, Any]:
        """What the votes depend on. Raises UserError if files of a reward model are missing or damaged."""
        models = {
            name: {"model": options.model, **_made_from(name, options)}
            for name, options in self.options.items()
        }
        return {"reward models": models, "strongest": self.strongest}


def reward_models_of(recipe: Recipe | None, named: Mapping[str, RewardModelOptions]) -> RewardModels | None:
    """The reward models of the command line, or else those that vote in the recipe; None if there are none.

    Raises UserError for a reward model of the recipe that is a file of scores or behind a server.
    """
    if named:
        return RewardModels(named, next(iter(named)))
    if recipe is None or recipe.strongest is None:
        return None
    options = {name: recipe.reward_models[name] for name in recipe.voting_reward_models}
    for name, each in options.items():
        if each.model is None:
            raise UserError(
                f"reward_models.{name}.scores: a file of scores has none of these answers. Name a model in "
                f"reward_models.{name}.model, or leave it out of selection.reward_models."
            )
        if each.server:
            raise UserError(
                f"reward_models.{name}.server: a reward model behind a server does not judge open-ended "
                "answers. Give a model in this process with --reward-model."
            )
    return RewardModels(options, recipe.strongest)


@dataclass(frozen=True)
class Score:
    """score: None for a conversation that the reward model cannot read, because it is too long."""

    conversation: str  # sha256 of messages and answer
    score: float | None


def judge_by_reward_models(
    reward_models: RewardModels,
    comparisons: Sequence[PairwiseComparison],
    answers: Mapping[str, Answers],
    output: Path,
    batch_tokens: int,
) -> list[Judgement]:
    """The judgements of the comparisons, in their order.

    Scores of an interrupted call are read and not made again.
    """
    decided = [decided_without_judge(comparison, answers) for comparison in comparisons]
    undecided = [
        comparison for comparison, judgement in zip(comparisons, decided, strict=True) if judgement is None
    ]
    scores = {
        name: _scores(name, options, undecided, answers, output, batch_tokens)
        for name, options in reward_models.options.items()
    }
    place = list(scores).index(reward_models.strongest)

    def judged(comparison: PairwiseComparison) -> Judgement:
        pairs = {
            name: [
                of_model[_key(comparison, side, answers)] for side in (comparison.model, comparison.opponent)
            ]
            for name, of_model in scores.items()
        }
        if any(score is None for pair in pairs.values() for score in pair):
            return Judgement(comparison, None, {"reason": "too long for a reward model", "scores": pairs})
        return Judgement(comparison, vote(np.array(list(pairs.values())), place), {"scores": pairs})

    return [
        judgement or judged(comparison) for comparison, judgement in zip(comparisons, decided, strict=True)
    ]


def vote(scores: np.ndarray, strongest: int) -> float:
    """The preference for the first of two answers: 1, 0, or 0.5 for a tie.

    scores [R, 2], without NaN. Every reward model votes for the higher score, and abstains between equal
    scores. With equal numbers of votes the strongest decides. `majority_vote` of the selection has the same
    rule, but gives ties to the first answer, because there one source must win.
    """
    ballots = np.sign(scores[:, 0] - scores[:, 1])
    total = np.sign(ballots.sum())
    return float((1 + (total if total else ballots[strongest])) / 2)


def _made_from(name: str, options: RewardModelOptions) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "chat format": load_reward_model_format(options, name).sha256,
        MODEL: reward_model_fingerprint(options, name),
    }


def _key(comparison: PairwiseComparison, name: str, answers: Mapping[str, Answers]) -> str:
    """The hash of a conversation of the comparison: that of one of its two models."""
    messages = conversation(comparison.prompt, comparison.turn, answers[name])
    return sha256_of_json([messages, answers[name][comparison.place].text])


def _scores(
    name: str,
    options: RewardModelOptions,
    comparisons: Sequence[PairwiseComparison],
    answers: Mapping[str, Answers],
    output: Path,
    batch_tokens: int,
) -> dict[str, float | None]:
    """The scores of all answers by one reward model, by the hash of their conversations."""
    path = output / "scores" / f"{name}.jsonl"
    with open_records(path, Score, _made_from(name, options)) as records:
        known = {row.conversation: row.score for row in records.rows}
        # Answers to one turn form a group, so that a prompt which they share is read once.
        groups: dict[tuple[str, int], dict[str, tuple[PairwiseComparison, str]]] = {}
        for comparison in comparisons:
            for side in (comparison.model, comparison.opponent):
                key = _key(comparison, side, answers)
                if key not in known:
                    groups.setdefault(comparison.place, {})[key] = comparison, side
        missing = sum(map(len, groups.values()))
        if not missing:
            log_complete(path, len(known), "scores")
            return known
        reward_model = load_reward_model(options, name)
        with Progress(path, "scores", len(known) + missing, already=len(known)) as progress:
            waiting = list(groups.values())
            for begin in range(0, len(waiting), _GROUPS):
                part = waiting[begin : begin + _GROUPS]
                progress.begin_part(sum(map(len, part)))
                for key, score in _score_groups(reward_model, part, answers, batch_tokens, progress):
                    records.add(Score(key, score))
                    known[key] = score
                progress.end_part(len(known))
    return known


def _score_groups(
    reward_model: RewardModel,
    groups: Sequence[Mapping[str, tuple[PairwiseComparison, str]]],
    answers: Mapping[str, Answers],
    batch_tokens: int,
    progress: Progress,
) -> list[tuple[str, float | None]]:
    """(key, score) of every conversation of the groups."""
    limit = reward_model.max_tokens or np.inf
    encoded = [
        {key: _encoded(reward_model, comparison, side, answers) for key, (comparison, side) in group.items()}
        for group in groups
    ]
    readable = [{key: ids for key, ids in group.items() if len(ids) <= limit} for group in encoded]
    rewards = score_conversations(
        reward_model,
        [list(group.values()) for group in readable],
        batch_tokens=batch_tokens,
        report=progress.update,
    )
    scores: dict[str, float | None] = {key: None for group in encoded for key in group}
    for group, values in zip(readable, rewards, strict=True):
        for key, value in zip(group, values.tolist(), strict=True):
            if not np.isfinite(value):
                raise UserError(
                    f"reward_models.{reward_model.name} gives {value} to an answer. Its weights are damaged, "
                    "or its dtype overflows. Set its dtype to bf16 or fp32, or fetch the model again."
                )
            scores[key] = value
    return list(scores.items())


def _encoded(
    reward_model: RewardModel, comparison: PairwiseComparison, name: str, answers: Mapping[str, Answers]
) -> np.ndarray:
    messages = conversation(comparison.prompt, comparison.turn, answers[name])
    return reward_model.encode(messages, answers[name][comparison.place].text)
