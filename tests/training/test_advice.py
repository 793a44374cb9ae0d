"""Warnings of a KL that is not least where the target equals its source, and of teachers with little stored
mass.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuse_kernels import TAILS, sparse_kl_cross_entropy
from synthetic import SyntheticDataset, make_tiny_recipe

from megatron_fuse.fusion_data.documents import Document
from megatron_fuse.recipe import Recipe
from megatron_fuse.training.advice import loss_advice, stored_mass, stored_mass_advice

VOCABULARY = 97


def gradient_at_equality(teacher: float, student: float, tail: str, *, stored: int) -> float:
    """The largest |d KL / d logit| in fp64, for a student with the logits of its teacher."""
    logits = 3 * torch.randn(7, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    top = (logits / teacher).log_softmax(1).topk(stored, dim=1)
    student_logits = logits.clone().requires_grad_()
    ones = torch.ones(len(logits), dtype=torch.float64)
    losses = sparse_kl_cross_entropy(
        student_logits,
        torch.full((len(logits),), -100),
        top.indices,
        top.values,
        ce_weight=ones,
        kl_weight=ones,
        temperature=student,
        tail=tail,
        implementation="reference",
    )
    losses.loss.sum().backward()
    assert student_logits.grad is not None
    return student_logits.grad.abs().max().item()


def recipe_with(**loss: Any) -> Recipe:
    return make_tiny_recipe(Path("work"), Path("target"), loss=loss)


# 1 and 2: the common choices; 0.7: below 1
@pytest.mark.parametrize(("teacher", "student", "tail"), product((0.7, 1.0, 2.0), (0.7, 1.0, 2.0), TAILS))
def test_a_loss_is_warned_of_if_and_only_if_it_moves_a_target_that_equals_its_source(
    teacher: float, student: float, tail: str
) -> None:
    lines = loss_advice(recipe_with(teacher_temperature=teacher, student_temperature=student, tail=tail))
    moves = gradient_at_equality(teacher, student, tail, stored=5)
    assert moves < 1e-14 or moves > 1e-3, "neither rounding nor a gradient"
    assert bool(lines) == (moves > 1e-3)
    text = "\n".join(lines)
    assert (f"loss.student_temperature is {student:g}" in text) == (teacher != student)
    assert (f"Set loss.student_temperature to {teacher:g}" in text) == (teacher != student)
    assert (f"loss.tail is {tail}" in text) == (tail != "bucket")


@pytest.mark.parametrize("tail", TAILS)
def test_every_tail_is_least_at_equality_if_all_entries_are_stored(tail: str) -> None:
    assert gradient_at_equality(2.0, 2.0, tail, stored=VOCABULARY) < 1e-14


def test_a_schedule_without_kl_is_not_warned_of() -> None:
    loss = {"tail": "ignore", "teacher_temperature": 2.0, "student_temperature": 1.0}
    csft = make_tiny_recipe(Path("work"), Path("target"), loss=loss, schedule={"preset": "csft"})
    assert loss_advice(recipe_with(**loss)) and not loss_advice(csft)


class Scaled(SyntheticDataset):
    """The stored mass of every row, 0.9, times a factor."""

    def __init__(self, factor: dict[str, float]) -> None:
        super().__init__()
        self.factor = factor

    def document(self, mode: str, example: int) -> Document:
        document = super().document(mode, example)
        shift = np.float32(np.log(self.factor[mode]))
        return replace(document, teacher_logprobs=document.teacher_logprobs + shift)


@pytest.mark.parametrize(("inference", "training"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.55), (0.4, 0.3)])
def test_a_source_is_named_if_less_than_half_of_its_mass_is_stored(inference: float, training: float) -> None:
    dataset = Scaled({"inference": inference, "training": training})
    recipe = recipe_with()
    lines = stored_mass_advice(recipe, dataset)  # type: ignore[arg-type]
    expected = {
        (source, mode): f"{0.9 * factor:.0%}"
        for mode, factor in dataset.factor.items()
        for source in dataset.sources
        if 0.9 * factor < 0.5
    }
    assert len(lines) == len(expected)
    for (source, mode), share in expected.items():
        (line,) = (line for line in lines if line.startswith(f"source {source}, {mode} mode: only {share} "))
        for key in ("capture.top_k (10)", "capture.top_p (0.95)", "capture.temperatures"):
            assert key in line


def test_the_stored_mass_is_a_mean_over_the_rows_with_entries() -> None:
    dataset = SyntheticDataset(examples=300)
    documents = [dataset.documents["training", example] for example in dataset.train[::2]]
    # Of more than 256 examples every second one is read.
    rows = sum(int((document.counts > 0).sum()) for document in documents if document)
    mass = sum(float(np.exp(document.teacher_logprobs).sum()) for document in documents if document)
    found = stored_mass(dataset, "training", dataset.train)  # type: ignore[arg-type]
    assert found == pytest.approx(mass / rows)
    assert stored_mass(dataset, "training", dataset.train[:0]) is None  # type: ignore[arg-type]
