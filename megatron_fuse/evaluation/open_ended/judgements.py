"""Pairwise comparisons: two models' answers to the same turn of a prompt, and what a judge says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_fuse.evaluation.open_ended.answers import Answers, Turn, turns_of
from megatron_fuse.evaluation.open_ended.prompts import Prompt

WIN, TIE, LOSS = 1.0, 0.5, 0.0
PAIRS = ("baseline", "all")


@dataclass(frozen=True)
class PairwiseComparison:
    """Two answers to one turn. Both are there."""

    prompt: Prompt
    turn: int
    model: str
    opponent: str

    @property
    def place(self) -> Turn:
        return self.prompt.id, self.turn


@dataclass(frozen=True)
class Judgement:
    """preference: WIN, TIE or LOSS of the model; None if the judge gave no verdict.

    grounds: what the preference comes from, such as scores or verdicts, for the file of judgements.
    """

    comparison: PairwiseComparison
    preference: float | None
    grounds: Mapping[str, Any] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        comparison = self.comparison
        names = {"prompt": comparison.prompt.id, "turn": comparison.turn, "model": comparison.model}
        return {**names, "opponent": comparison.opponent, "preference": self.preference, **self.grounds}


def pairs_of(models: Sequence[str], baseline: str, pairs: str) -> list[tuple[str, str]]:
    """(model, opponent): every model against the baseline, then, for `all`, also every pair of the others."""
    others = [model for model in models if model != baseline]
    found = [(model, baseline) for model in others]
    if pairs == "all":
        found += [(model, others[place]) for at, model in enumerate(others) for place in range(at)]
    return found


def comparisons_of(
    prompts: Sequence[Prompt], answers: Mapping[str, Answers], pairs: Sequence[tuple[str, str]]
) -> list[PairwiseComparison]:
    """The comparisons of these pairs of models, over all turns that both have answered."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return [
        PairwiseComparison(by_id[place[0]], place[1], model, opponent)
        for model, opponent in pairs
        for place in turns_of(prompts)
        if place in answers[model] and place in answers[opponent]
    ]


def decided_without_judge(comparison: PairwiseComparison, answers: Mapping[str, Answers]) -> Judgement | None:
    """The judgement of a comparison that needs no judge; None for all others.

    Equal texts tie, and an empty answer loses against any other.
    """
    first, second = (
        answers[name][comparison.place].text.strip() for name in (comparison.model, comparison.opponent)
    )
    if first == second:
        return Judgement(comparison, TIE, {"reason": "equal texts"})
    if not first or not second:
        return Judgement(comparison, WIN if first else LOSS, {"reason": "one answer is empty"})
    return None
