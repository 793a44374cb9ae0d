"""The length-controlled win rate: what the win rate would be if both answers had the same length.

The regression is that of AlpacaEval 2 (Dubois et al., arXiv 2404.04475). For a model, and an opponent, the
probability that the judge prefers the model's answer to prompt x is

    p(x) = sigmoid(quality + length * tanh(d(x) / sd(d)) + scale * difficulty(x))

d(x): characters of the model's answer minus those of the opponent's. sd: the standard deviation over all
comparisons of the pair; the mean is not subtracted, so that 0 means equal lengths. quality, length and scale
are fitted by maximum likelihood; a tie is a preference of 0.5. The controlled win rate is the mean over x of
p(x) without its length term, that is, at d(x) = 0.

It differs from AlpacaEval 2 in these points:

- difficulty(x) comes from the comparisons of the other models of the same evaluation against the same
  opponent, by a regression of the same form with one common difficulty per prompt (AlpacaEval has fixed
  numbers for its 805 prompts). The model itself is left out: its own outcomes must not explain themselves.
  With no other model there is no such term.
- The coefficients have a small ridge penalty, RIDGE / 2 times their squares. It keeps them finite if the
  model always wins, or if length alone decides. AlpacaEval has an L1 penalty whose weight it finds by
  cross-validation.
- AlpacaEval adds the comparisons of two models that were asked to answer at length or briefly, with a weight
  of 0.2. They do not exist for other prompts and judges.
"""

from collections.abc import Sequence

import numpy as np

from megatron_fuse.evaluation.open_ended.answers import Turn
from megatron_fuse.evaluation.open_ended.preferences import Preferences

RIDGE = 0.01  # on every coefficient, beside a sum of log-losses over the comparisons
DIFFICULTY_RIDGE = 1.0  # on every difficulty: a prompt has few comparisons, so a standard normal prior
_STEPS, _HALVINGS, _ROUNDS = 100, 40, 200  # the most; all loops end earlier
_TOLERANCE, _SMALL_STEP = 1e-7, 1e-4  # of coefficients and of difficulties


def controlled_win_rate(
    preference: np.ndarray, difference: np.ndarray, difficulty: np.ndarray | None, weights: np.ndarray
) -> np.ndarray:
    """The controlled win rates [b] of b weightings of n comparisons.

    preference [n] in [0, 1]. difference [n]: in characters. difficulty [n], or None for no such term. weights
    [b, n]: how often each comparison counts.
    """
    columns = [np.ones_like(preference), length_term(difference)]
    columns += [] if difficulty is None else [difficulty]
    features = np.stack(columns, axis=1)  # [n, k]
    coefficients = fit(features, preference, weights)  # [b, k]
    features[:, 1] = 0
    return np.sum(weights * _sigmoid(coefficients @ features.T), axis=1) / weights.sum(1)


def length_term(difference: np.ndarray) -> np.ndarray:
    """tanh of the differences in standard deviations; 0 if all differences are equal, which tell nothing."""
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    return np.tanh(difference / deviation) if deviation > 0 else np.zeros_like(difference)


def instruction_difficulty(others: Sequence[Preferences]) -> dict[Turn, float]:
    """How much easier the other models' comparisons at a place were to win than on average.

    others: the comparisons of each other model against the same opponent. A place without one is not in the
    result; its difficulty is 0.

    The coefficients of the models and the difficulties are fitted in turn until nothing changes. Each step
    raises the penalised likelihood, which has one maximum.
    """
    numbers = {
        place: number for number, place in enumerate(dict.fromkeys(p for o in others for p in o.places))
    }
    owner = np.array([numbers[place] for other in others for place in other.places], np.int64)
    preference = np.concatenate([other.preference for other in others])
    features = np.zeros((len(owner), 2 * len(others)))
    ends = np.cumsum([len(other.places) for other in others])
    for column, (other, end) in enumerate(zip(others, ends, strict=True)):
        rows = slice(end - len(other.places), end)
        features[rows, 2 * column] = 1
        features[rows, 2 * column + 1] = length_term(other.difference)
    difficulty, coefficients = np.zeros(len(numbers)), np.zeros((1, features.shape[1]))
    once = np.ones((1, len(owner)))
    for _ in range(_ROUNDS):
        coefficients = fit(features, preference, once, difficulty[owner], coefficients)
        step = _difficulty_step(preference, features @ coefficients[0], difficulty, owner)
        difficulty = difficulty + step
        if np.abs(step).max(initial=0) < _SMALL_STEP:
            break
    return dict(zip(numbers, difficulty.tolist(), strict=True))


def _difficulty_step(
    preference: np.ndarray, fixed: np.ndarray, difficulty: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """A step of every difficulty towards the maximum. fixed [n]: the rest of the exponent.

    The gradient is divided by an upper bound of the curvature (p (1 - p) is at most 1 / 4), so that no step
    goes too far.
    """
    predicted = _sigmoid(fixed + difficulty[owner])
    gradient = np.bincount(owner, preference - predicted, len(difficulty)) - DIFFICULTY_RIDGE * difficulty
    return gradient / (DIFFICULTY_RIDGE + np.bincount(owner, minlength=len(difficulty)) / 4)


def fit(
    features: np.ndarray,
    preference: np.ndarray,
    weights: np.ndarray,
    offset: np.ndarray | float = 0.0,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """The coefficients [b, k] of b logistic regressions with a ridge, by Newton's method.

    features [n, k]; preference [n] in [0, 1]; weights [b, n]; offset [n]: added to the exponent. start [b,
    k]: coefficients to begin with, which change only the time.
    """
    samples, count = len(weights), features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), count * count)
    coefficients = np.zeros((samples, count)) if start is None else start
    value = _likelihood(features, preference, weights, offset, coefficients)
    for _ in range(_STEPS):
        predicted = _sigmoid(coefficients @ features.T + offset)  # [b, n]
        gradient = (weights * (preference - predicted)) @ features - RIDGE * coefficients
        curvature = (weights * predicted * (1 - predicted)) @ products
        hessian = curvature.reshape(samples, count, count) + RIDGE * np.eye(count)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        if np.abs(step).max(initial=0) < _TOLERANCE:
            break
        # The likelihood is concave, so that a short enough step raises it.
        share = np.ones((samples, 1))
        for _ in range(_HALVINGS):
            reached = _likelihood(features, preference, weights, offset, coefficients + share * step)
            falls = reached < value - 1e-9 * np.abs(value)
            if not falls.any():
                break
            share[falls] /= 2
        coefficients, value = coefficients + share * step, reached
    return coefficients


def _likelihood(
    features: np.ndarray,
    preference: np.ndarray,
    weights: np.ndarray,
    offset: np.ndarray | float,
    coefficients: np.ndarray,
) -> np.ndarray:
    """The penalised log-likelihoods [b]."""
    exponent = coefficients @ features.T + offset
    likelihood = weights * (preference * exponent - np.logaddexp(0, exponent))
    return likelihood.sum(1) - RIDGE / 2 * np.sum(coefficients**2, axis=1)


def _sigmoid(exponent: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -exponent))
