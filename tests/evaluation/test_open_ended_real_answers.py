"""Win rates over real answers with GPT-4's recorded preferences; needs ../shared/data."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_fuse.evaluation.open_ended.answers import given_answers
from megatron_fuse.evaluation.open_ended.judgements import Judgement, comparisons_of, pairs_of
from megatron_fuse.evaluation.open_ended.prompts import read_prompts
from megatron_fuse.evaluation.open_ended.win_rates import PairResult, pair_results

DATA = Path(__file__).parents[2] / "../shared/data/responses"
SCORES = "alpaca_eval_gpt4__win_vs_text_davinci_003"
BASELINE = "text_davinci_003"

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, (DATA / "alpaca_eval.jsonl").open())}


@pytest.fixture(scope="module")
def pairs(rows: dict[str, dict]) -> list[PairResult]:
    """Every model with a recorded preference against the baseline of these preferences."""
    prompts = read_prompts(DATA / "alpaca_eval.jsonl")
    models = list(next(iter(rows.values()))["scores"][SCORES])
    answers = {model: given_answers(model, prompts) for model in [BASELINE, *models]}
    compared = pairs_of(list(answers), BASELINE, "baseline")
    judgements = [
        Judgement(comparison, rows[comparison.prompt.id]["scores"][SCORES][comparison.model])
        for comparison in comparisons_of(prompts, answers, compared)
    ]
    return pair_results(judgements, answers, compared)


def test_win_rates_are_the_means_of_the_recorded_preferences(
    pairs: list[PairResult], rows: dict[str, dict]
) -> None:
    assert {pair.model for pair in pairs} == {"gpt4", "llama-2-7b-chat-hf", "alpaca-7b"}
    for pair in pairs:
        recorded = np.array([row["scores"][SCORES][pair.model] for row in rows.values()])
        assert pair.overall.win_rate.value == pytest.approx(recorded.mean(), rel=1e-12)
        assert (pair.overall.wins, pair.overall.ties) == ((recorded == 1).sum(), (recorded == 0.5).sum())
        expected = recorded.std(ddof=1) / np.sqrt(len(recorded))
        assert pair.overall.win_rate.standard_error == pytest.approx(expected, rel=0.1)
        for category, tally in pair.categories.items():
            of_category = [
                row["scores"][SCORES][pair.model] for row in rows.values() if row["dataset"] == category
            ]
            assert tally.win_rate.value == pytest.approx(np.mean(of_category), rel=1e-12)


def test_a_model_with_longer_answers_loses_by_the_control_of_length(
    pairs: list[PairResult], rows: dict[str, dict]
) -> None:
    """All three write more than the baseline, two of them a thousand characters more. The judge prefers long
    answers. So the control of length takes from all, and least from the one with the least difference.
    """
    lost = {}
    for pair in pairs:
        texts = [row["responses"] for row in rows.values()]
        difference = np.mean([len(each[pair.model]) - len(each[BASELINE]) for each in texts])
        lost[difference] = pair.overall.win_rate.value - pair.overall.controlled.value
    assert min(lost) > 0 and all(value > 0 for value in lost.values())
    assert lost[min(lost)] == min(lost.values())


def test_the_answers_of_mt_bench_are_read_in_both_turns() -> None:
    prompts = read_prompts(DATA / "mt_bench.jsonl")
    assert len(prompts) == 40 and all(len(prompt.turns) == 2 for prompt in prompts)
    assert len({prompt.category for prompt in prompts}) == 8
    assert sum(prompt.references[1] is not None for prompt in prompts) == 15
    for model in ("gpt-4", "vicuna-7b-v1.5", "llama-2-7b-chat", "mpt-7b-chat"):
        assert len(given_answers(model, prompts)) == 80
