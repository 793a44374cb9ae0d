"""The results of an open-ended evaluation: answers, win rates by every judge, and what they depend on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_fuse.evaluation.open_ended.answers import Answers, turns_of
from megatron_fuse.evaluation.open_ended.judgements import Judgement
from megatron_fuse.evaluation.open_ended.length_control import DIFFICULTY_RIDGE, RIDGE
from megatron_fuse.evaluation.open_ended.prompts import Prompt
from megatron_fuse.evaluation.open_ended.win_rates import SAMPLES, SEED, PairResult

STATISTICS = {
    "bootstrap": {"samples": SAMPLES, "seed": SEED, "drawn": "prompts"},
    "length control": {"ridge": RIDGE, "difficulty ridge": DIFFICULTY_RIDGE},
}

_ONE_SIDED = 0.1  # below this share of comparisons a regression has hardly seen answers of equal length


@dataclass(frozen=True)
class AnswerCounts:
    """The answers of one model.

    missing: turns without an answer in the prompts file. characters: the mean length.
    """

    answers: int
    missing: int
    empty: int
    truncated: int
    characters: float


@dataclass(frozen=True)
class Judged:
    """What one judge found. settings: what the judge is, for the JSON file."""

    judge: str
    settings: Mapping[str, Any]
    pairs: Sequence[PairResult]
    judgements: Sequence[Judgement]

    @property
    def disagreements(self) -> int:
        """Comparisons that are ties because the verdict changed when the answers changed places."""
        verdicts = [judgement.grounds.get("verdicts") for judgement in self.judgements]
        agreeing = ({"A", "B"}, {"C"})
        return sum(
            found is not None and None not in found.values() and set(found.values()) not in agreeing
            for found in verdicts
        )


@dataclass(frozen=True)
class OpenEndedResults:
    """answers: by model. made_from: by model what its answers were made from."""

    prompts: Sequence[Prompt]
    baseline: str
    answers: Mapping[str, Answers]
    judges: Sequence[Judged]
    made_from: Mapping[str, Any]

    def counts(self, model: str) -> AnswerCounts:
        found = list(self.answers[model].values())
        return AnswerCounts(
            answers=len(found),
            missing=len(turns_of(self.prompts)) - len(found),
            empty=sum(not answer.text.strip() for answer in found),
            truncated=sum(answer.truncated for answer in found),
            characters=sum(len(answer.text) for answer in found) / max(len(found), 1),
        )

    @property
    def notes(self) -> list[str]:
        """Facts that the tables cannot show."""
        notes = [
            f"{model}: {counts.missing} of {len(turns_of(self.prompts))} turns have no answer in the prompts "
            "file; they are not judged"
            for model in self.answers
            if (counts := self.counts(model)).missing
        ]
        for judged in self.judges:
            undecided = sum(judgement.preference is None for judgement in judged.judgements)
            if undecided:
                notes.append(
                    f"{judged.judge}: {undecided} of {len(judged.judgements)} comparisons have no verdict, "
                    "and are in no win rate (judgements.jsonl has the reasons)"
                )
            if judged.disagreements:
                notes.append(
                    f"{judged.judge}: in {judged.disagreements} of {len(judged.judgements)} comparisons the "
                    "verdict changed with the order of the answers; these are ties"
                )
            notes += [
                f"{judged.judge}: {pair.model} has the longer answer in {100 * pair.longer:.0f} % of its "
                f"comparisons against {pair.opponent}: its length-controlled win rate is an extrapolation"
                for pair in judged.pairs
                if pair.overall.judged and not _ONE_SIDED <= pair.longer <= 1 - _ONE_SIDED
            ]
        return notes

    def as_json(self) -> dict[str, Any]:
        return {
            "made_from": self.made_from,
            "statistics": STATISTICS,
            "prompts": len(self.prompts),
            "turns": len(turns_of(self.prompts)),
            "baseline": self.baseline,
            "answers": {model: asdict(self.counts(model)) for model in self.answers},
            "judges": [
                {
                    "judge": judged.judge,
                    "settings": judged.settings,
                    "order disagreements": judged.disagreements,
                    "pairs": [asdict(pair) for pair in judged.pairs],
                }
                for judged in self.judges
            ],
            "notes": self.notes,
        }

    def judgement_rows(self) -> list[dict[str, Any]]:
        """The rows of judgements.jsonl."""
        return [
            {"judge": judged.judge, **judgement.as_row()}
            for judged in self.judges
            for judgement in judged.judgements
        ]
