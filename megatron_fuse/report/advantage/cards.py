"""Ten examples to look at: chosen by what they show, the same ones for the same data."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from megatron_fuse.instructions import Example
from megatron_fuse.report.advantage.numbers import GROUND_TRUTH, tied
from megatron_fuse.report.advantage.observations import FLAGS, Observations
from megatron_fuse.responses import Response
from megatron_fuse.scoring.reference import MEASURES
from megatron_fuse.selection.rules import NONE

CARDS = 10


@dataclass(frozen=True)
class Choice:
    """example: place among the observed ones; reason: why it is shown."""

    example: int
    reason: str


def choose_cards(seen: Observations) -> list[Choice]:
    """The first CARDS different examples, taken in turn from what can be seen in the data: clear wins of
    every source, ties, disagreement and agreement of the modes, narrow wins, winners that are cut off or
    refuse, examples that nobody wins, or that one wins without a competitor."""
    chosen: dict[int, str] = {}
    for turn in zip_longest(*_queues(seen)):
        for choice in turn:
            if choice and len(chosen) < CARDS:
                chosen.setdefault(choice.example, choice.reason)
        if len(chosen) == CARDS:
            break
    return [Choice(example, reason) for example, reason in chosen.items()]


def _queues(seen: Observations) -> list[Iterator[Choice]]:
    """One for every reason, what shows it best first."""
    mode = "inference" if "inference" in seen.selections else "training"
    arrays = seen.selections[mode]
    won = arrays["source"] != NONE
    compared = won & np.isfinite(arrays["margin"])  # there is a second to be ahead of
    order = np.lexsort((-_gap(seen, mode), -np.where(compared, arrays["margin"], -np.inf)))
    ties = won & tied(arrays["votes"], seen.answers.same) if seen.reward_models else np.zeros(len(won), bool)
    clear = order[(compared & ~ties & (arrays["margin"] > 0))[order]]
    return [
        _clear_wins(seen, mode, clear),
        _each(
            order[ties[order]],
            "a tie of votes, which the strongest reward model decides for {inference}",
            seen,
        ),
        *(_between_modes(seen) if len(seen.selections) == 2 else []),
        _each(clear[::-1], f"a narrow win of {{{mode}}} in {mode} mode", seen),
        *(_flagged_winners(seen) if mode == "inference" else []),
        _each(np.flatnonzero(~won), f"no source wins in {mode} mode", seen),
        _each(np.flatnonzero(won & ~compared), f"{{{mode}}} wins {mode} mode without a competitor", seen),
    ]


def _between_modes(seen: Observations) -> list[Iterator[Choice]]:
    """Examples with a winner in both modes, those first in which both are sure: the lower of the two ranks
    counts.
    """
    training, inference = (seen.selections[mode] for mode in ("training", "inference"))
    order = np.argsort(-np.minimum(_rank(training["margin"]), _rank(inference["margin"])), kind="stable")
    both = (training["source"] != NONE) & (inference["source"] != NONE)
    same = training["source"] == inference["source"]
    differ, agree = order[(both & ~same)[order]], order[(both & same)[order]]
    return [
        _each(differ, "the modes disagree: {training} in training, {inference} in inference", seen),
        _each(agree, "{inference} is ahead in both modes", seen),
    ]


def _flagged_winners(seen: Observations) -> list[Iterator[Choice]]:
    source = seen.selections["inference"]["source"]
    winner = np.maximum(source, 0).astype(np.int64)[:, None]
    queues = []
    for flags, what in ((seen.answers.truncated, "is cut off"), (seen.answers.refused, "declines to answer")):
        flagged = (source != NONE) & np.take_along_axis(flags, winner, 1)[:, 0]
        queues.append(_each(np.flatnonzero(flagged), f"the winning answer, of {{inference}}, {what}", seen))
    return queues


def _rank(margin: np.ndarray) -> np.ndarray:
    """[n] place among the sorted margins, equal ones in the order of the examples; nothing comparable is
    last.
    """
    order = np.argsort(np.where(np.isfinite(margin), margin, -np.inf), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _gap(seen: Observations, mode: str) -> np.ndarray:
    """[n]: how far the winner is ahead in the strongest reward model's scores, which orders examples of
    equal votes.
    """
    if mode == "training" or not seen.reward_models:
        return np.zeros(len(seen.numbers))
    arrays = seen.selections[mode]
    scores = np.nan_to_num(arrays["scores"][..., seen.strongest].astype(float), nan=-np.inf)
    winner = np.maximum(arrays["source"], 0).astype(np.int64)[:, None]
    same = seen.answers.same
    best_other = np.where(same == np.take_along_axis(same, winner, 1), -np.inf, scores).max(1)
    winners_score = np.take_along_axis(scores, winner, 1)[:, 0]
    return np.subtract(
        winners_score,
        best_other,
        out=np.zeros(len(winners_score)),
        where=np.isfinite(best_other) & np.isfinite(winners_score),
    )


def _clear_wins(seen: Observations, mode: str, order: np.ndarray) -> Iterator[Choice]:
    """The sources in turn, so that not all are wins of one."""
    winner = seen.selections[mode]["source"][order]
    for turn in zip_longest(*(order[winner == source] for source in range(len(seen.sources)))):
        examples = [example for example in turn if example is not None]
        yield from _each(np.array(examples), f"a clear win of {{{mode}}} in {mode} mode", seen)


def _each(examples: np.ndarray, reason: str, seen: Observations) -> Iterator[Choice]:
    for example in examples.tolist():
        names = {mode: _winner(seen, mode, example) for mode in seen.selections}
        yield Choice(example, reason.format(**names))


def _winner(seen: Observations, mode: str, example: int) -> str | None:
    winner = int(seen.selections[mode]["source"][example])
    return None if winner == NONE else seen.sources[winner]


def card(seen: Observations, choice: Choice, example: Example, responses: list[Response]) -> dict[str, Any]:
    """{id, reason, category, system, messages, winners {mode: source}, margins, weights {mode: number},
    answers}.

    answers: of the ground truth and every source {name, text, same_as: a source of the same text, wins:
    modes, flags, scores {reward_model: number}, votes, reference {measure: number}, nats_per_byte}. What
    there is not is null or left out.
    """
    index = choice.example
    winners = {mode: _winner(seen, mode, index) for mode in seen.selections}
    answers: list[dict[str, Any]] = [
        {"name": GROUND_TRUTH, "text": example.response, "truncated": example.truncated}
    ]
    for number, source in enumerate(seen.sources):
        response = responses[number] if responses else None
        answers.append(
            {
                "name": source,
                "text": response and response.response,
                "same_as": _same_as(seen, index, number),
                "wins": [mode for mode, winner in winners.items() if winner == source],
                **(_flags(seen, index, number) if response else {}),
                **_measures(seen, index, number),
            }
        )
    return {
        "id": example.id,
        "reason": choice.reason,
        "category": example.category,
        "system": example.system,
        "messages": example.messages,
        "winners": winners,
        "margins": {mode: _number(arrays["margin"][index]) for mode, arrays in seen.selections.items()},
        "weights": {mode: float(arrays["weight"][index]) for mode, arrays in seen.selections.items()},
        "answers": answers,
    }


def _same_as(seen: Observations, example: int, source: int) -> str | None:
    """The first source, before this one, with the same text."""
    same = seen.answers.same[example]
    first = int((same == same[source]).argmax()) if len(same) and same[source] else source
    return seen.sources[first] if first < source else None


def _flags(seen: Observations, example: int, source: int) -> dict[str, bool]:
    return {flag: bool(getattr(seen.answers, flag)[example, source]) for flag in FLAGS}


def _measures(seen: Observations, example: int, source: int) -> dict[str, Any]:
    measures_of_answer: dict[str, Any] = {}
    if inference := seen.selections.get("inference"):
        if seen.reward_models:
            scores = inference["scores"][example, source]
            measures_of_answer["scores"] = {
                reward_model: _number(score)
                for reward_model, score in zip(seen.reward_models, scores, strict=True)
            }
            measures_of_answer["votes"] = int(inference["votes"][example, source])
        if "reference" in inference:
            measures = [*inference["reference"][example, source], inference["score"][example, source]]
            measures_of_answer["reference"] = dict(
                zip([*MEASURES, "score"], map(_number, measures), strict=True)
            )
    if training := seen.selections.get("training"):
        divisor = max(int(training["response_bytes"][example]), 1)
        measures_of_answer["nats_per_byte"] = _number(training["ce_sum"][example, source] / divisor)
    return measures_of_answer


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
