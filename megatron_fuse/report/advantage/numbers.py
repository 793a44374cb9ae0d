"""Which source has the advantage, where, and how far those who decide it agree.

One JSON object. A share or mean of nothing is null; NOBODY stands for no source.

    rules       {mode: rule}; sources, reward_models: names
    examples    counted: all others are of these; validation: left out
    wins        {mode: {source or NOBODY: {examples, share, low, high}}}, low and high being Wilson's 95 %
                interval
    margins     {mode: {median: of the winners' margins; lowered: winners that do not count in full; dropped:
                not at all}}
    modes       of the examples with a winner in both: examples, agree, chance, kappa; table [S][S] of counts,
                rows by the
                training mode's winner, columns by the inference mode's; null unless both modes are in use
    reward_models   favourites {reward model: {source: share}}; pairs [{reward_models: [a, b], examples,
                    agree, chance,
                kappa}]; winner {reward model: its agreement with the choice}; tied: share of the examples
                with a winner where several answers have most votes; unanimous: share where all reward models
                have one favourite; null without reward models
    groups      {"instruction length" or "category": [{group, examples, wins {mode: as above}}]}
    lengths     by: what the groups are; groups [{group, examples, median {GROUND_TRUTH or source:
                characters}}]; the first is all
    system_messages     different, examples: that have one; frequent [{text, examples, share}]
    answers     {GROUND_TRUTH or source: {answers, empty, truncated, refused, unmatched, characters {mean,
                median}, tokens
                {mean, median}}}; lengths are of answers that are not empty
"""

from typing import Any

import numpy as np

from megatron_fuse.report.advantage.observations import FLAGS, Observations
from megatron_fuse.selection.rules import NONE, able_answers, best_score

NOBODY = "no source"
GROUND_TRUTH = "ground truth"
FREQUENT = 10  # system messages that are listed
CATEGORIES = 12  # shown at most; what is rarer than the 11 most frequent is one group then
_Z = 1.959964  # of the normal distribution's middle 95 %


def advantage_numbers(seen: Observations) -> dict[str, Any]:
    winners = {mode: arrays["source"] for mode, arrays in seen.selections.items()}
    both = len(winners) == 2
    groups = {"instruction length": quartiles(seen.instruction_characters)}
    if seen.categories:
        groups["category"] = frequent_groups(seen.category, seen.categories, CATEGORIES)
    return {
        "sources": seen.sources,
        "reward_models": _reward_models(seen) if seen.reward_models else None,
        "rules": seen.rules,
        "examples": {"counted": len(seen.numbers), "validation": seen.validation},
        "wins": {mode: wins(source, seen.sources) for mode, source in winners.items()},
        "margins": {mode: margins(arrays) for mode, arrays in seen.selections.items()},
        "modes": _modes(winners["training"], winners["inference"], len(seen.sources)) if both else None,
        "groups": {
            name: [
                {
                    "group": group,
                    "examples": int(members.sum()),
                    "wins": {mode: wins(source[members], seen.sources) for mode, source in winners.items()},
                }
                for group, members in parts
            ]
            for name, parts in groups.items()
        },
        "lengths": _lengths(seen),
        "system_messages": _system_messages(seen),
        "answers": _answers(seen),
    }


def wins(winner: np.ndarray, sources: list[str]) -> dict[str, dict[str, float | int | None]]:
    """winner int [n]: place of a source, NONE where no source has the advantage."""
    counts = np.bincount(winner.astype(np.int64) - NONE, minlength=1 + len(sources)).tolist()
    by_source = {}
    for name, count in zip([*sources, NOBODY], [*counts[1:], counts[0]], strict=True):
        low, high = wilson(count, len(winner))
        by_source[name] = {"examples": count, "share": _ratio(count, len(winner)), "low": low, "high": high}
    return by_source


def most_wins(report: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """By mode the source with most wins and its share, where any source wins."""
    by_mode = {}
    for mode, by_source in report["wins"].items():
        name = max(report["sources"], key=lambda source: by_source[source]["examples"])
        if by_source[name]["examples"]:
            by_mode[mode] = (name, by_source[name]["share"])
    return by_mode


def wilson(part: int, whole: int) -> tuple[float | None, float | None]:
    """The interval that holds the true share in 95 of 100 cases (Wilson 1927), also near 0 and 1 and for
    few examples.
    """
    if not whole:
        return None, None
    share, correction = part / whole, _Z**2 / whole
    middle = (share + correction / 2) / (1 + correction)
    half = _Z / (1 + correction) * np.sqrt(share * (1 - share) / whole + correction / (4 * whole))
    return float(max(middle - half, 0)), float(min(middle + half, 1))


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float | int | None]:
    """Of two raters' choices int [n], NONE = no choice, over the examples where both choose.

    chance: the agreement of independent raters who choose as often as these do; kappa = (agree - chance) / (1
    - chance) (Cohen 1960), null where chance is 1: both always choose the same one.
    """
    chosen = (first != NONE) & (second != NONE)
    first, second = first[chosen].astype(np.int64), second[chosen].astype(np.int64)
    if not len(first):
        return {"examples": 0, "agree": None, "chance": None, "kappa": None}
    choices = 1 + max(first.max(), second.max())
    one, other = (np.bincount(choice, minlength=choices) for choice in (first, second))
    agree = int((first == second).sum())
    by_chance, squared = int(one @ other), len(first) ** 2
    kappa = _ratio(agree * len(first) - by_chance, squared - by_chance)
    return {
        "examples": len(first),
        "agree": agree / len(first),
        "chance": by_chance / squared,
        "kappa": kappa,
    }


def favourites(scores: np.ndarray, same: np.ndarray) -> np.ndarray:
    """int [n, R]: the source whose answer each reward model likes best, NONE where no answer can win.

    scores float [n, S, R] and same int [n, S] as in `able_answers`: an answer without a score of any one is
    nobody's favourite, and of identical texts the first is.
    """
    able = np.where(able_answers(scores, same), same, 0)
    return np.stack(
        [best_score(scores[..., reward_model], able) for reward_model in range(scores.shape[2])], 1
    )


def tied(votes: np.ndarray, same: np.ndarray) -> np.ndarray:
    """bool [n]: several different answers have the most votes. votes int [n, S], those of the source's
    answer.
    """
    most = (votes == votes.max(1, keepdims=True)) & (votes > 0) & (same != 0)
    first = np.take_along_axis(same, most.argmax(1)[:, None], 1)
    return (most & (same != first)).any(1)


def margins(arrays: dict[str, np.ndarray]) -> dict[str, float | int | None]:
    won = arrays["source"] != NONE
    weight, margin = arrays["weight"][won], arrays["margin"][won]
    return {
        "median": _median(margin[np.isfinite(margin)]),
        "lowered": int(((weight > 0) & (weight < 1)).sum()),
        "dropped": int((weight == 0).sum()),
    }


def quartiles(characters: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(range, bool [n]) of four groups as equal as equal lengths allow, which stay together; fewer where
    lengths do not differ.
    """
    cuts = (
        np.unique(np.quantile(characters, [0.25, 0.5, 0.75], method="lower"))
        if len(characters)
        else np.zeros(0)
    )
    quarter = np.searchsorted(cuts, characters)
    parts = [quarter == part for part in range(len(cuts) + 1)]
    groups = []
    for members in parts:
        if members.any():
            ends = (f"{end:,}" for end in (characters[members].min(), characters[members].max()))
            groups.append((f"{' to '.join(dict.fromkeys(ends))} characters", members))
    return groups


def frequent_groups(codes: np.ndarray, names: list[str], most: int) -> list[tuple[str, np.ndarray]]:
    """(name, bool [n]) by falling frequency, then in the order of names; at most `most`, the rarest being one
    group.

    codes int [n]: places in names, -1 for none, which is the last group.
    """
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    order = [code for code in np.argsort(-counts, kind="stable") if counts[code]]
    shown = order if len(order) <= most else order[: most - 1]
    parts = [(names[code], codes == code) for code in shown]
    if len(order) > most:
        parts.append(("all others", np.isin(codes, order[most - 1 :])))
    return parts + [("none given", codes < 0)] * bool((codes < 0).any())


def _reward_models(seen: Observations) -> dict[str, Any]:
    arrays, same = seen.selections["inference"], seen.answers.same
    liked = favourites(arrays["scores"], same)
    won = arrays["source"] != NONE
    ties = tied(arrays["votes"], same)
    numbered = list(enumerate(seen.reward_models))
    return {
        "favourites": {
            reward_model: {
                source: _ratio((liked[:, j] == column).sum(), (liked[:, j] != NONE).sum())
                for column, source in enumerate(seen.sources)
            }
            for j, reward_model in numbered
        },
        "pairs": [
            {"reward_models": [reward_model, other], **agreement(liked[:, j], liked[:, k])}
            for j, reward_model in numbered
            for k, other in numbered[j + 1 :]
        ],
        "winner": {reward_model: agreement(liked[:, j], arrays["source"]) for j, reward_model in numbered},
        "tied": _ratio((ties & won).sum(), won.sum()),
        "unanimous": _ratio(((liked == liked[:, :1]).all(1) & won).sum(), won.sum()),
    }


def _modes(training: np.ndarray, inference: np.ndarray, sources: int) -> dict[str, Any]:
    both = (training != NONE) & (inference != NONE)
    cells = training[both].astype(np.int64) * sources + inference[both]
    table = np.bincount(cells, minlength=sources**2).reshape(sources, sources)
    return {**agreement(training, inference), "table": table.tolist()}


def _lengths(seen: Observations) -> dict[str, Any]:
    parts = [("all examples", np.ones(len(seen.numbers), bool))]
    by = "system message" if seen.system_messages else "category" if seen.categories else None
    if by == "system message":
        frequent = [(text, seen.system == code) for text, code in _frequent_systems(seen)]
        parts += frequent + [("none given", seen.system < 0)] * bool((seen.system < 0).any())
    elif by:
        parts += frequent_groups(seen.category, seen.categories, CATEGORIES)
    answers = seen.answers
    columns = {GROUND_TRUTH: seen.characters.astype(float)}
    for column, source in enumerate(seen.sources[: answers.empty.shape[1]]):
        columns[source] = np.where(answers.empty[:, column], np.nan, answers.characters[:, column])
    return {
        "by": by,
        "groups": [
            {
                "group": group,
                "examples": int(members.sum()),
                "median": {name: _median(lengths[members]) for name, lengths in columns.items()},
            }
            for group, members in parts
        ],
    }


def _frequent_systems(seen: Observations) -> list[tuple[str, int]]:
    counts = np.bincount(seen.system[seen.system >= 0], minlength=len(seen.system_messages))
    order = np.argsort(-counts, kind="stable")[:FREQUENT].tolist()
    return [(seen.system_messages[code], code) for code in order if counts[code]]


def _system_messages(seen: Observations) -> dict[str, Any]:
    examples = len(seen.numbers)
    rows = [(text, int((seen.system == code).sum())) for text, code in _frequent_systems(seen)]
    return {
        "different": len(np.unique(seen.system[seen.system >= 0])),
        "examples": int((seen.system >= 0).sum()),
        "frequent": [
            {"text": text, "examples": count, "share": _ratio(count, examples)} for text, count in rows
        ],
    }


def _answers(seen: Observations) -> dict[str, Any]:
    by_name = {
        GROUND_TRUTH: {
            "answers": len(seen.numbers),
            "empty": 0,
            "truncated": int(seen.truncated.sum()),
            "refused": None,
            "unmatched": None,
            "characters": _mean_and_median(seen.characters),
            "tokens": _mean_and_median(seen.characters[:0]),
        }
    }
    answers = seen.answers
    for column, source in enumerate(seen.sources[: answers.empty.shape[1]]):
        has_answer = ~answers.empty[:, column]
        by_name[source] = {
            "answers": int(has_answer.sum()),
            **{flag: int(getattr(answers, flag)[:, column].sum()) for flag in FLAGS},
            "characters": _mean_and_median(answers.characters[has_answer, column]),
            "tokens": _mean_and_median(answers.tokens[has_answer, column]),
        }
    return by_name


def _mean_and_median(values: np.ndarray) -> dict[str, float | None]:
    return {"mean": float(values.mean()) if len(values) else None, "median": _median(values)}


def _median(values: np.ndarray) -> float | None:
    """NaN stands for no value."""
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else None


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
