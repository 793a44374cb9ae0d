"""The decided comparisons of one pair of models as arrays, for statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fuse.evaluation.open_ended.answers import Answers, Turn
from megatron_fuse.evaluation.open_ended.judgements import Judgement


@dataclass(frozen=True, eq=False)
class Preferences:
    """The decided comparisons of one pair.

    places: of each comparison. preference [n] in [0, 1]. difference [n]: characters of the model's answer
    minus those of the opponent's.
    """

    places: Sequence[Turn]
    preference: np.ndarray
    difference: np.ndarray

    def reversed(self) -> "Preferences":
        return Preferences(self.places, 1 - self.preference, -self.difference)


def preferences_of(judgements: Sequence[Judgement], answers: Mapping[str, Answers]) -> Preferences:
    """The decided ones of the judgements of one pair. answers: by model, for their lengths."""
    decided = [each for each in judgements if each.preference is not None]
    lengths = [
        len(answers[each.comparison.model][each.comparison.place].text)
        - len(answers[each.comparison.opponent][each.comparison.place].text)
        for each in decided
    ]
    preference = np.array([each.preference for each in decided], np.float64)
    return Preferences([each.comparison.place for each in decided], preference, np.array(lengths, np.float64))
