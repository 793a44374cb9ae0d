"""How often a rule that selects among models' answers prefers the one that a strong judge preferred.

    python benchmarks/selection_agreement.py --answers alpaca_eval.jsonl --reference gpt4 \
        [--reward-model-tokenizer TOKENIZER.model]

--answers: JSONL rows {id, instruction, responses: {model: text}, scores: {judge: {model: score}}}. For every
judge and every pair of models that it compared with one baseline, the share of the rows, ties left out, in
which the rule and the judge prefer the same answer; beside it chance (0.5) as the baseline of the ratio, and,
as a rule of its own, "always the longer answer". The standard error is in the unit's column. The reference
model's answers are the ground truth, so that it is in no pair.

With --reward-model-tokenizer also what the three small reward models of `preference_models.py` say, by vote
and the first one alone. They are trained twice, on every other row, and score the rows that they have not
seen.
"""

import argparse
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from preference_models import NAMES, options_of, train_reward_models
from table import Measurement, run

from megatron_fuse.recipe import ReferenceOptions
from megatron_fuse.scoring.conversations import score_conversations
from megatron_fuse.scoring.reference import MEASURES, combine, reference_measures
from megatron_fuse.scoring.reward_models import load_reward_model
from megatron_fuse.storage import read_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--reference", required=True, help="model whose answers are the ground truth")
    parser.add_argument(
        "--bertscore-model", help="directory of the encoder; without it BLEU and ROUGE-L have weight 0.5 each"
    )
    parser.add_argument(
        "--reward-model-tokenizer", type=Path, help="file of a tokenizer for training small reward models"
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    rows = [row for _, row in read_jsonl(options.answers)]
    judges = {judge: set(rows[0]["scores"][judge]) - {options.reference} for judge in rows[0]["scores"]}
    models = sorted(set().union(*judges.values()))
    rules = _rules(options, rows, models)
    found = []
    for judge, compared in judges.items():
        for pair in combinations(sorted(compared), 2):
            preferred = np.sign(
                [row["scores"][judge][pair[0]] - row["scores"][judge][pair[1]] for row in rows]
            )
            for rule, values in rules.items():
                # Reward models vote, each one vote for one of the two; a single value is a vote alone.
                difference = np.sign(np.sign(values[pair[0]] - values[pair[1]]).sum(1))
                found.append(_agreement(f"{judge}: {pair[0]} / {pair[1]}: {rule}", difference, preferred))
    return found


def _rules(
    options: argparse.Namespace, rows: list[dict], models: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """{rule: {model: float64 [n, r]: r values that vote, the higher the better}}"""
    reference = ReferenceOptions(bertscore_model=options.bertscore_model, without_bertscore="renormalize")
    truth = [row["responses"][options.reference] for row in rows]
    texts = {model: [row["responses"][model] for row in rows] for model in models}
    measures = {model: reference_measures(reference, texts[model], truth) for model in models}
    rules = {
        "longer answer": {
            model: np.array([[len(text)] for text in texts[model]], np.float64) for model in models
        },
        "reference": {model: combine(measures[model], reference)[:, None] for model in models},
    }
    for place, name in enumerate(MEASURES):
        if not np.isnan(measures[models[0]][:, place]).all():
            rules[name] = {model: measures[model][:, [place]].astype(np.float64) for model in models}
    if options.reward_model_tokenizer:
        rewards = _rewards(options.reward_model_tokenizer, rows, models)
        rules["vote of three small reward models"] = rewards
        rules["one small reward model"] = {model: rewards[model][:, :1] for model in models}
    return rules


def _rewards(tokenizer: Path, rows: list[dict], models: list[str]) -> dict[str, np.ndarray]:
    """{model: float32 [n, reward models]}; a row is scored by those that were trained on the other half of
    the rows.
    """
    rewards = np.zeros((len(rows), len(models), len(NAMES)), np.float32)
    for half in (0, 1):
        asked = rows[half::2]
        with TemporaryDirectory() as directory:
            trained = train_reward_models(Path(directory), tokenizer, rows[1 - half :: 2])
            for place, (name, path) in enumerate(trained.items()):
                reward_model = load_reward_model(options_of(path), name)
                groups = [
                    [
                        reward_model.encode(
                            [{"role": "user", "content": row["instruction"]}], row["responses"][m]
                        )
                        for m in models
                    ]
                    for row in asked
                ]
                rewards[half::2, :, place] = score_conversations(reward_model, groups, batch_tokens=16384)
    return {model: rewards[:, place] for place, model in enumerate(models)}


def _agreement(name: str, difference: np.ndarray, preferred: np.ndarray) -> Measurement:
    asked = (preferred != 0) & np.isfinite(difference)
    # A rule that sees no difference is right half the time.
    right = np.where(difference == 0, 0.5, difference == preferred)[asked]
    error = right.std() / max(np.sqrt(len(right)), 1)
    return Measurement(name, float(right.mean()), f"+- {error:.3f}, n {len(right)}", "chance", 0.5)


if __name__ == "__main__":
    raise SystemExit(run(__doc__, add_arguments, measure))
