"""The KL of a student that is identical to its teacher, for every form of the loss. Needs no training.

    python examples/real_model/identical.py --build examples/real_model/build \\
        --output docs/results/real_model_identical.csv

The teacher's distributions are stored as the capture stage stores them, and compared by the loss of training.
A loss that is least where the student equals its teacher has KL 0 and gradient 0 in every row of this table.
"""

import argparse
import csv
import platform
from collections.abc import Sequence
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import torch
from conversations import encode, in_batches, read_rows, response_logits
from fuse_kernels import TAILS, sparse_kl_cross_entropy
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fuse.capture.distributions import SparseRows, sparse_rows
from megatron_fuse.errors import exit_code
from megatron_fuse.experiments.runs import code_version

TEMPERATURES = ((1.0, 1.0), (2.0, 2.0), (2.0, 1.0))  # teacher, student
STORED = ((10, 0.95), (50, 0.95), (10, 1.0), (50, 1.0))  # top_k, top_p


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument("--output", type=Path, required=True, help="CSV file")
    options = parser.parse_args()
    model = options.build / "models" / "base"
    rows = measure(model, options.build / "held_out.jsonl")
    where = {
        "commit": code_version(),
        "machine": f"{platform.machine()}, CPU",
        "date": date.today().isoformat(),
    }
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | where for row in rows)


def measure(directory: Path, conversations: Path) -> list[dict]:
    """One row per form of the loss, means over all tokens of the responses.

    kl, ce in nats per token. gradient: the sum of the absolute values of d KL / d logits. mass: the teacher's
    mass in the stored entries. below_half: the share of tokens with less than half of the mass there.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    encoded = [encode(tokenizer, row) for row in read_rows(conversations)]
    found: dict[tuple, list[Tensor]] = {}
    for batch in in_batches(encoded, 8):
        with torch.no_grad():
            logits, labels = response_logits(model, batch, tokenizer.pad_token_id)
        for (top_k, top_p), (teacher, student) in product(STORED, TEMPERATURES):
            captured = sparse_rows(
                logits, labels, top_k=top_k, top_p=top_p, filter="full_vocabulary", temperatures=[teacher]
            )
            ids, logprobs = teacher_rows(captured, teacher, top_k)
            for tail in TAILS:
                values = of_itself(logits, labels, ids, logprobs, temperature=student, tail=tail)
                found.setdefault((top_k, top_p, teacher, student, tail), []).append(values)
    names = ("top_k", "top_p", "teacher_temperature", "student_temperature", "tail")
    return [dict(zip(names, key, strict=True)) | summary(torch.cat(parts)) for key, parts in found.items()]


def teacher_rows(captured: SparseRows, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """ids [m, top_k], -1 = empty, and log-probabilities [m, top_k] at the temperature."""
    stored = np.arange(top_k) < captured.counts[:, None]
    ids = np.full(stored.shape, -1, np.int64)
    logprobs = np.zeros(stored.shape)
    ids[stored] = captured.ids
    logprobs[stored] = captured.logits / temperature - np.repeat(captured.lse[:, 1], captured.counts)
    return torch.from_numpy(ids), torch.from_numpy(logprobs)


def of_itself(
    logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, *, temperature: float, tail: str
) -> Tensor:
    """[m, 4]: KL, CE, stored mass of the teacher, and sum of the gradient's absolute values."""
    own = logits.clone().requires_grad_()
    ones = torch.ones(len(own))
    losses = sparse_kl_cross_entropy(
        own, labels, ids, logprobs, ce_weight=0 * ones, kl_weight=ones, temperature=temperature, tail=tail
    )
    losses.loss.sum().backward()
    assert own.grad is not None
    return torch.stack([losses.kl, losses.ce, losses.teacher_mass, own.grad.abs().sum(1)], dim=1)


def summary(values: Tensor) -> dict[str, float | int]:
    """values [m, 4] of of_itself, of all tokens."""
    kl, ce, mass, gradient = values.double().mean(0).tolist()
    below = (values[:, 2] < 0.5).double().mean().item()
    means: Sequence[tuple[str, float]] = (
        ("kl", kl), ("gradient", gradient), ("mass", mass), ("below_half", below), ("ce", ce)
    )  # fmt: skip
    return {name: round(value, 4) for name, value in means} | {"tokens": len(values)}


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
