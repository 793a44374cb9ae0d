"""The losses of every preset, step by step, are those of the file: no change of the code moves them
unnoticed.

golden_losses.json holds, for each preset, the cross-entropies, KLs and gradient norms of five steps of a tiny
model on made-up data in fp32. If a change means to move them, write the file again and say why in the commit:

    FUSE_WRITE_GOLDEN=1 python -m pytest tests/training/test_golden_losses.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_tiny_target
from test_layouts import TRAINING, one_report, run_training

from megatron_fuse.recipe import PRESETS

FILE = Path(__file__).with_name("golden_losses.json")
DIGITS = 7  # as many as fp32 has
RELATIVE = 2e-4  # processors differ in the order of their sums


def rounded(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """The losses and the gradient norm of each step."""
    kept = ("ce/", "kl/", "grad norm", "loss")
    return [
        {name: float(f"{value:.{DIGITS}g}") for name, value in step.items() if name.startswith(kept)}
        for step in steps
    ]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("golden"), layers=2)


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_are_those_of_the_file(ranks: Any, target: Path, tmp_path: Path, preset: str) -> None:
    loss = {"teacher_temperature": 2.0, "student_temperature": 1.0, "tail": "bucket"}  # those of the file
    sections = {"training": TRAINING, "schedule": {"preset": preset}, "loss": loss}
    found = rounded(one_report(ranks(1, run_training, tmp_path, target, sections))["steps"])
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("FUSE_WRITE_GOLDEN"):
        FILE.write_text(json.dumps(golden | {preset: found}, indent=1, sort_keys=True) + "\n")
        return
    assert set(golden) == set(PRESETS), "every preset has its losses in the file"
    assert len(found) == len(golden[preset]) == TRAINING["train_iters"]
    for step, (values, expected) in enumerate(zip(found, golden[preset], strict=True)):
        assert values.keys() == expected.keys() and {"grad norm"} < values.keys(), step
        assert values == pytest.approx(expected, rel=RELATIVE, abs=1e-7), step
