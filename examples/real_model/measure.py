"""Measure one model and write what an experiment asks for: {metric: {value, n}}.

    python examples/real_model/measure.py --model DIRECTORY --split held_out --output FILE.json

Split `held_out`: the cross-entropy of held-out ground truth in nats per 100 tokens (the tables show one
decimal). Split `tasks`: log-likelihood accuracies of ARC-Challenge, HellaSwag and WinoGrande in per cent,
without examples in the prompt, by the functions of `megatron-fuse evaluate`, and their mean.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from conversations import encode, in_batches, read_rows, response_logits
from make_all import QUESTIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.evaluation import benchmarks_named, evaluate, models_named


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", choices=("held_out", "tasks"), required=True)
    parser.add_argument("--build", type=Path, default=Path(__file__).parent / "build")
    options = parser.parse_args()
    if options.split == "held_out":
        ce, tokens = held_out_cross_entropy(options.model, options.build / "held_out.jsonl")
        metrics = {"held_out": {"value": 100 * ce, "n": tokens}}
    else:
        accuracies = task_accuracies(options.model, options.build / "questions")
        metrics = {name: {"value": value, "n": QUESTIONS[name]} for name, value in accuracies.items()}
        mean = sum(accuracies.values()) / len(accuracies)
        metrics["tasks"] = {"value": mean, "n": sum(QUESTIONS.values())}
    options.output.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def held_out_cross_entropy(directory: Path, conversations: Path) -> tuple[float, int]:
    """Mean cross-entropy of the responses in nats per token of the model's tokenizer, and their tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    encoded = [encode(tokenizer, row) for row in read_rows(conversations)]
    total, tokens = 0.0, 0
    for batch in in_batches(encoded, 8):
        logits, labels = response_logits(model, batch, tokenizer.pad_token_id)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        tokens += len(labels)
    return total / tokens, tokens


def task_accuracies(directory: Path, questions: Path) -> dict[str, float]:
    """task -> accuracy in per cent, of questions without worked examples before them."""
    benchmarks = [replace(benchmark, shots=0) for benchmark in benchmarks_named(list(QUESTIONS))]
    with TemporaryDirectory() as output:
        comparison, failures = evaluate(
            models_named([f"model={directory}"]), benchmarks, Path(output), data=questions, batch_size=16
        )
    if failures:
        raise UserError(f"{directory}: {'; '.join(failures.values())}")
    values = {row.benchmark.name: row.values["model"].value for row in comparison.rows}
    return {name: 100 * value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
