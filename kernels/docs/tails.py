"""Draws tails.svg: what each of the three tails does to the logits of a student.

    python kernels/docs/tails.py

The gradients are those of `sparse_kl_cross_entropy` itself, in fp64 at T = 1. The teacher has stored its six
likeliest tokens, 0.7 of its mass. The students divide what they put there as the teacher does, so that only
their tails differ from it.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from fuse_kernels import TAILS, sparse_kl_cross_entropy
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

STORED, COLUMNS = 6, 30
TEACHER_TAIL = 0.3
STUDENT_TAILS = (0.6, 0.1)
BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#8a8a8a"
TITLES = {
    "bucket": "bucket: the tail is one more outcome; its total is led to the teacher's, its shape left alone",
    "renormalize": "renormalize: the stored entries are the whole teacher; the tail is led to 0",
    "ignore": "ignore: the tail has no term; it is led to 0 too, with 0.7 of that force, and D may be "
    "negative",
}


def distributions(student_tail: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher and student [COLUMNS], in descending order of the teacher; what it has off the ids only the
    picture knows.
    """
    on_ids = torch.linspace(1.0, 0.45, STORED, dtype=torch.float64) ** 2
    on_ids = on_ids / on_ids.sum()
    falling = 1 / torch.arange(1, COLUMNS - STORED + 1, dtype=torch.float64) ** 0.4
    # A student whose tail has another order than the teacher's.
    uneven = falling * (1 + 0.75 * torch.sin(2.4 * torch.arange(len(falling), dtype=torch.float64)))
    teacher = torch.cat((on_ids * (1 - TEACHER_TAIL), falling / falling.sum() * TEACHER_TAIL))
    return teacher, torch.cat((on_ids * (1 - student_tail), uneven / uneven.sum() * student_tail))


def divergence(teacher: torch.Tensor, student: torch.Tensor, tail: str) -> tuple[float, torch.Tensor]:
    """D and its gradient over the student's logits [COLUMNS]."""
    logits = student.log()[None].requires_grad_()
    weights = {"ce_weight": torch.zeros(1), "kl_weight": torch.ones(1)}
    entries = torch.tensor([-100]), torch.arange(STORED)[None], teacher[None, :STORED].log()
    # The reference keeps the logits; the others would write the gradient over them.
    loss, *_ = sparse_kl_cross_entropy(logits, *entries, **weights, tail=tail, implementation="reference")
    loss.sum().backward()
    return loss.item(), logits.grad[0]


def draw(path: Path) -> None:
    figure = Figure(figsize=(11, 10), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    axes = figure.subplots(1 + len(TAILS), len(STUDENT_TAILS), sharex=True, sharey="row")
    columns = np.arange(COLUMNS)
    colours = [BLUE] * STORED + [ORANGE] * (COLUMNS - STORED)
    for side, student_tail in enumerate(STUDENT_TAILS):
        teacher, student = distributions(student_tail)
        axes[0, side].bar(columns, student, 0.8, color=colours)
        axes[0, side].stairs(teacher, np.arange(COLUMNS + 1) - 0.5, color="black", linewidth=1.3)
        title = f"student with {student_tail:g} in the tail (the teacher has {TEACHER_TAIL:g})"
        axes[0, side].set_title(title, fontweight="bold")
        for axis, tail in zip(axes[1:, side], TAILS, strict=True):
            value, gradient = divergence(teacher, student, tail)
            total = gradient[STORED:].sum().item()
            axis.bar(columns, gradient, 0.8, color=colours)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_ylim(-0.24, 0.12)  # one scale for all three
            note = f"D = {value:.3f}\nsum over the tail {total:+.2f}: it {'falls' if total > 0 else 'rises'}"
            note = note.replace("-", "\N{MINUS SIGN}")
            axis.text(0.98, 0.06, note, transform=axis.transAxes, ha="right", va="bottom", linespacing=1.5)
    keys = [Patch(color=BLUE), Patch(color=ORANGE), Line2D([], [], color="black", linewidth=1.3)]
    axes[0, 1].legend(keys, ["student, stored entries", "student, tail", "teacher"], frameon=False)
    axes[0, 0].set_ylabel("probability")
    for axis, tail in zip(axes[1:, 0], TAILS, strict=True):
        axis.set_title(TITLES[tail], loc="left")
        axis.set_ylabel("gradient over the logit\n(below 0: the logit rises)")
    for axis in axes.flat:
        axis.axvline(STORED - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axis.set_xticks([])
    for axis in axes[-1]:
        axis.set_xlabel("columns of the vocabulary, the teacher's likeliest first")
    with matplotlib.rc_context({"svg.hashsalt": "tails"}):  # the same bytes every time
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("tails.svg"), help="output file, .svg or .png"
    )
    draw(parser.parse_args().out)
