"""Functions that the YAML tasks name: last number and worked examples of GSM8K, mass of TruthfulQA."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_COMMA_IN_NUMBER = re.compile(r"(\d),(\d)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


def last_number(text: str) -> str:
    """The last number of an answer, or the whole text if it has no number.

    This is the rule of Open-Instruct's eval/gsm/run_eval.py. Commas between digits are dropped. A sign counts
    only before a decimal fraction. This does no harm, because the comparison ignores punctuation, there and
    here.
    """
    numbers = _NUMBER.findall(_COMMA_IN_NUMBER.sub(r"\1\2", text))
    return numbers[-1] if numbers else text


def last_numbers(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A filter of the harness: responses of every question -> their last numbers."""
    return [[last_number(text) for text in of_question] for of_question in responses]


def worked_examples() -> list[dict[str, str]]:
    """The eight worked examples of Wei et al. (arXiv 2201.11903), taken from the harness's own
    `gsm8k_cot`.
    """
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    task_file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    return load_yaml(task_file)["fewshot_config"]["samples"]


def truthful_mass(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """TruthfulQA's MC2 (Lin et al., arXiv 2109.07958): the true answers' share of the probability.

    results: (log-likelihood, is greedy) of every answer of doc["mc2_targets"]. Probabilities are computed
    relative to the likeliest answer: for a weak model, all long answers have probability 0 in floating point.
    The harness's own formula then divides 0 by 0.
    """
    log_likelihoods = np.array([log_likelihood for log_likelihood, _ in results])
    mass = np.exp(log_likelihoods - log_likelihoods.max())
    true = np.array(doc["mc2_targets"]["labels"]) == 1
    return {"acc": float(mass[true].sum() / mass.sum())}
