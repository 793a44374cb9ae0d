"""Win rates: the share of judged comparisons that a model wins, ties counted half, with errors by a
bootstrap.

The bootstrap draws prompts, not comparisons: the turns of one prompt are not independent of each other. An
unanimous result has an interval without width, because no drawn sample differs from it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_fuse.evaluation.open_ended.answers import Answers, Turn
from megatron_fuse.evaluation.open_ended.judgements import LOSS, TIE, WIN, Judgement
from megatron_fuse.evaluation.open_ended.length_control import controlled_win_rate, instruction_difficulty
from megatron_fuse.evaluation.open_ended.preferences import Preferences, preferences_of
from megatron_fuse.progress import Progress

SAMPLES, SEED = 1000, 0  # of the bootstrap
_BLOCK = 1 << 21  # most weights of a block of samples: 16 MiB


@dataclass(frozen=True)
class Rate:
    """A share in [0, 1], its standard error, and its 95 % interval. One prompt alone gives no errors."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Tally:
    """The judgements of one pair of models, or some of them.

    no_verdict: comparisons that the judge did not decide; they are in no other number. win_rate: None without
    a decided comparison. controlled: the length-controlled win rate; None if it was not computed.
    """

    wins: int
    ties: int
    losses: int
    no_verdict: int
    win_rate: Rate | None
    controlled: Rate | None

    @property
    def judged(self) -> int:
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class PairResult:
    """One model against another: over everything, by turn, and by category of the prompts.

    longer: share of the decided comparisons in which the model's answer has more characters.
    """

    model: str
    opponent: str
    longer: float
    overall: Tally
    turns: Mapping[int, Tally]
    categories: Mapping[str, Tally]


def pair_results(
    judgements: Sequence[Judgement], answers: Mapping[str, Answers], pairs: Sequence[tuple[str, str]]
) -> list[PairResult]:
    """The result of every pair that has a comparison, by the judgements of one judge.

    answers: by model, for their lengths.
    """
    of_pair: dict[tuple[str, str], list[Judgement]] = {pair: [] for pair in pairs}
    for judgement in judgements:
        of_pair[judgement.comparison.model, judgement.comparison.opponent].append(judgement)
    of_pair = {pair: found for pair, found in of_pair.items() if found}
    preferences = {pair: preferences_of(found, answers) for pair, found in of_pair.items()}
    results = []
    with Progress("win rates", "pairs", len(of_pair)) as progress:
        for pair, found in of_pair.items():
            results.append(_pair_result(pair, found, answers, preferences))
            progress.advance()
    return results


def _pair_result(
    pair: tuple[str, str],
    judgements: Sequence[Judgement],
    answers: Mapping[str, Answers],
    preferences: Mapping[tuple[str, str], Preferences],
) -> PairResult:
    model, opponent = pair
    others = _others_against(opponent, model, preferences)
    difficulty = instruction_difficulty(others) if others else {}
    overall = _tally(judgements, answers, difficulty)
    turns = sorted({judgement.comparison.turn for judgement in judgements})
    by_turn = {turn: [each for each in judgements if each.comparison.turn == turn] for turn in turns}
    named = {each.comparison.prompt.category for each in judgements}
    by_category = {
        category: [each for each in judgements if each.comparison.prompt.category == category]
        for category in sorted(name for name in named if name is not None)
    }
    longer = preferences[pair].difference > 0
    return PairResult(
        model,
        opponent,
        float(longer.mean()) if len(longer) else 0.0,
        overall,
        {
            turn: overall if len(turns) == 1 else _tally(found, answers, difficulty)
            for turn, found in by_turn.items()
        },
        # A category has too few prompts for a regression.
        {category: _tally(found, answers, None) for category, found in by_category.items()},
    )


def _others_against(
    opponent: str, model: str, preferences: Mapping[tuple[str, str], Preferences]
) -> list[Preferences]:
    """The comparisons of all other models against the same opponent, as (other model, opponent)."""
    others = [
        found for (first, second), found in preferences.items() if second == opponent and first != model
    ]
    return others + [
        found.reversed()
        for (first, second), found in preferences.items()
        if first == opponent and second != model
    ]


def _tally(
    judgements: Sequence[Judgement], answers: Mapping[str, Answers], difficulty: Mapping[Turn, float] | None
) -> Tally:
    """difficulty: empty for no such term in the regression; None for no regression."""
    given = [judgement.preference for judgement in judgements]
    preferences = preferences_of(judgements, answers)
    win_rate = controlled = None
    if preferences.places:
        win_rate = bootstrapped(preferences, partial(_weighted_mean, preferences.preference))
        if difficulty is not None:
            places = np.array([difficulty.get(place, 0.0) for place in preferences.places])
            controlled = bootstrapped(
                preferences,
                partial(
                    controlled_win_rate,
                    preferences.preference,
                    preferences.difference,
                    places if difficulty else None,
                ),
            )
    return Tally(
        given.count(WIN), given.count(TIE), given.count(LOSS), given.count(None), win_rate, controlled
    )


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(1)


def bootstrapped(preferences: Preferences, estimate: Callable[[np.ndarray], np.ndarray]) -> Rate:
    """An estimate, with the spread of it over samples of the prompts.

    estimate: weights [b, n] of the comparisons -> the estimates [b].
    """
    value = float(estimate(np.ones((1, len(preferences.places))))[0])
    prompts = {
        prompt: number for number, prompt in enumerate(dict.fromkeys(p for p, _ in preferences.places))
    }
    if len(prompts) < 2:
        return Rate(value, None, None, None)
    owners = np.array([prompts[prompt] for prompt, _ in preferences.places])
    drawn = np.concatenate([estimate(counts[:, owners]) for counts in _samples(len(prompts), len(owners))])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Rate(value, float(drawn.std(ddof=1)), float(low), float(high))


def _samples(prompts: int, comparisons: int) -> Iterator[np.ndarray]:
    """How often each prompt is drawn in each sample, float64 [b, prompts], in blocks of samples."""
    random = np.random.default_rng(SEED)
    size = max(_BLOCK // max(comparisons, prompts), 1)
    for begin in range(0, SAMPLES, size):
        count = min(size, SAMPLES - begin)
        yield random.multinomial(prompts, np.full(prompts, 1 / prompts), count).astype(np.float64)
