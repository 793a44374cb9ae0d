"""The whole recipe under torchrun with two ranks at a tiny size; then killed and resumed.

A plain run starts the first stage as a user does. The processes of the other stages are forks of one that has
imported everything. A slow test starts all of them as a user does.
"""

import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from killable_ranks import KillableRanks, run_module
from small_models import save_model, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.errors import UserError
from megatron_fuse.model.carried_files import copy_beside_weights
from megatron_fuse.pipeline import run
from megatron_fuse.recipe import load_recipe

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"iteration +(\d+)/ +(\d+) .*?phase: (\S+) .*?( ce/.*? grad norm: \S+)")
COLOURS = ["red", "green", "blue", "black", "white"]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of three architectures, two reward models, 40 instructions in Alpaca form."""
    directory = tmp_path_factory.mktemp("run")
    sizes = {"alpha": ("llama", 300), "beta": ("mpt", 310), "gamma": ("gpt_neox", 290)}
    models = {
        name: save_model(directory / name, family, seed=seed, vocab_size=vocab_size)
        for seed, (name, (family, vocab_size)) in enumerate(sizes.items())
    }
    reward_models = {
        name: save_model(directory / name, "llama", seed=seed, reward=True) for seed, name in enumerate("jk")
    }
    rows = [
        {
            "instruction": f"Name {i} things that are {colour}.",
            "output": f"Here are {i} {colour} things: " + "apple, " * (i % 5),
        }
        for i in range(8)
        for colour in COLOURS
    ]
    recipe = {
        "workdir": str(directory / "work"),
        "target": {"model": str(models["alpha"])},
        "sources": {name: {"model": str(path), "dtype": "fp32"} for name, path in models.items()},
        "reward_models": {
            name: {"model": str(path), "dtype": "fp32"} for name, path in reward_models.items()
        },
        "data": {
            "path": str(write_rows(directory / "data.jsonl", rows)),
            "validation_samples": 4,
            "shard_size": 16,
        },
        "responses": {"max_new_tokens": 12},
        "loss": {"student_temperature": 1.0},  # the sources' is 2, so that the run warns
        "schedule": {"preset": "profuser"},
        "parallel": {"tensor_model_parallel_size": 2},
        "training": {
            "seq_length": 120,
            "micro_batch_size": 8,
            "global_batch_size": 12,
            "lr": 3e-3,
            "precision": "fp32",
            "save_interval": 2,
        },
        "export": {"dtype": "fp32"},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_tool(recipe_file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """As a user does, with two processes."""
    command = [
        sys.executable,
        str(ROOT / "tools/run_recipe.py"),
        "--recipe",
        str(recipe_file),
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*command, *words], env=environment(), capture_output=True, text=True, cwd=ROOT, check=False
    )


def run_forked(ranks: KillableRanks, outputs: Path, words: list[str], env: Mapping[str, str]) -> int:
    """Takes the place of pipeline.run.run_tied: the command's exit code.

    Its output goes to files under `outputs`.
    """
    assert words[:2] == [sys.executable, "-m"]
    torchrun = words[2] == "megatron_fuse.torchrun"
    processes = 1
    if torchrun:
        assert words[3] == "--standalone" and words[5] == "-m"
        processes, words = int(words[4].removeprefix("--nproc-per-node=")), words[4:]
    return max(ranks.wait(ranks.start(processes, outputs, run_module, words[2:], torchrun=torchrun)))


def printed(directory: Path) -> str:
    return "".join(path.read_text() for path in sorted(directory.glob("output-*.txt")))


@pytest.fixture(scope="module")
def finished(recipe_file: Path) -> tuple[Path, str]:
    """The work directory after all stages, and what they printed."""
    first = run_tool(recipe_file, "--until", "instructions")
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    ranks, outputs = KillableRanks(), recipe_file.parent / "outputs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_tied", partial(run_forked, ranks, outputs))
        try:
            run.run_recipe(load_recipe(argv=["--recipe", str(recipe_file)]), 2)
        except UserError as error:
            pytest.fail(f"{error}\n{printed(outputs)[-8000:]}")
    ranks.close()
    return Path(yaml.safe_load(recipe_file.read_text())["workdir"]), first.stdout + printed(outputs)


def logged_steps(output: str) -> dict[int, tuple[str, str]]:
    """iteration -> (phase, losses and gradient norm as printed)."""
    return {int(iteration): (phase, values) for iteration, _, phase, values in LINE.findall(output)}


def test_training_goes_through_both_phases(finished: tuple[Path, str]) -> None:
    _, output = finished
    steps = logged_steps(output)
    assert list(steps) == list(range(1, 10))  # 36 examples in batches of 12: 3 steps, then 6
    assert [phase for phase, _ in steps.values()] == ["inference"] * 3 + ["co-fusion"] * 6
    assert all(
        "ce/training" in values and "kl/training" in values
        for phase, values in steps.values()
        if phase == "co-fusion"
    )
    validation = [float(value) for value in re.findall(r"validation at .*? ce/training: (\S+)", output)]
    assert len(validation) == 3 and validation[-1] < validation[0]


TEMPERATURES = "loss.teacher_temperature is 2, but loss.student_temperature is 1"


def test_a_run_warns_once_of_its_temperatures_and_of_little_stored_mass(finished: tuple[Path, str]) -> None:
    """Random models spread their mass over the whole vocabulary."""
    _, output = finished
    training = output[: output.index("iteration        1/")].splitlines()
    assert sum(f"warning: {TEMPERATURES}" in line for line in training) == 1
    dataset = FusionDataset(load_recipe(argv=["--recipe", str(finished[0] / "recipe.yaml")]))
    for mode in ("inference", "training"):
        winners = {dataset.sources[number] for number in dataset.winners(mode)[dataset.train] if number >= 0}
        found = re.findall(rf"warning: source (\w+), {mode} mode: only \d+% of its mass", "\n".join(training))
        assert winners and sorted(found) == sorted(winners)


def test_megatron_opens_every_stream(finished: tuple[Path, str]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    paths = sorted(finished[0].glob("fusion/**/*.idx"))
    assert len(paths) > 10
    for path in paths:
        dataset = IndexedDataset(str(path.with_suffix("")))
        stored = np.fromfile(path.with_suffix(".bin"), dataset.index.dtype)
        assert len(stored) == dataset.index.sequence_lengths.sum()
        for index in range(len(dataset)):
            assert len(dataset[index]) == dataset.index.sequence_lengths[index]


def test_the_exported_model_is_the_trained_one(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    exported = workdir / "export"
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    before = AutoModelForCausalLM.from_pretrained(workdir.parent / "alpha").eval()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template
    # The validation cross-entropy that training printed last, computed anew by transformers from the stored
    # documents.
    metadata = json.loads((exported / "fusion.json").read_text())["facts"]
    assert validation_cross_entropy(workdir, model) == pytest.approx(metadata["best_loss"], rel=1e-4)


def validation_cross_entropy(workdir: Path, model: torch.nn.Module) -> float:
    dataset = FusionDataset(load_recipe(argv=["--recipe", str(workdir / "recipe.yaml")]))
    total, count = 0.0, 0
    for example in dataset.validation:
        document = dataset.document("training", int(example))
        tokens = document.tokens.astype(np.int64)
        with torch.no_grad():
            logprobs = model(torch.from_numpy(tokens)[None]).logits[0].double().log_softmax(-1)
        labels = np.flatnonzero(document.supervised)
        total -= logprobs[labels - 1, tokens[labels]].sum().item()
        count += len(labels)
    return total / count


def test_a_second_run_finds_everything_done(
    finished: tuple[Path, str],
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["run_recipe", "--recipe", str(recipe_file), "--nproc-per-node", "2", "--plan"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/run_recipe.py"), run_name="__main__")
    assert not ended.value.code
    plan = capsys.readouterr().out
    lines = plan.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("artifact ")) + 1 :]
    states = [line.split("  ")[0] for line in table if " done " not in line + " "]
    assert states == ["training"] and "at step 9" in plan and TEMPERATURES in plan


@pytest.mark.slow
def test_the_tool_alone_ends_with_the_same_losses(
    finished: tuple[Path, str], recipe_file: Path, tmp_path: Path
) -> None:
    done = run_tool(recipe_file, "--workdir", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert logged_steps(done.stdout + done.stderr) == logged_steps(finished[1])
    assert (tmp_path / "work/export").exists()


OTHER_TARGETS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {}),
    "gemma3": (Gemma3TextConfig, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
}


def save_other_target(directory: Path, family: str, tokenizer_of: Path) -> Path:
    """A random model of a family with the tokenizer and the chat template of another model."""
    directory.mkdir()
    copy_beside_weights(tokenizer_of, directory)
    config_class, further = OTHER_TARGETS[family]
    config = config_class(
        vocab_size=json.loads((tokenizer_of / "config.json").read_text())["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=None,
        **further,
    )
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_TARGETS)
def test_a_target_of_another_family_is_one_line_of_the_recipe(
    recipe_file: Path, tmp_path: Path, family: str
) -> None:
    target = save_other_target(tmp_path / "target", family, recipe_file.parent / "alpha")
    done = run_tool(recipe_file, "--target-model", str(target), "--workdir", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert list(logged_steps(done.stdout + done.stderr)) == list(range(1, 10))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "work/export").eval()
    assert type(exported.config) is OTHER_TARGETS[family][0]
    metadata = json.loads((tmp_path / "work/export/fusion.json").read_text())["facts"]
    assert validation_cross_entropy(tmp_path / "work", exported) == pytest.approx(
        metadata["best_loss"], rel=1e-4
    )


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_is_not_exported(
    finished: tuple[Path, str], recipe_file: Path, tmp_path: Path
) -> None:
    elsewhere = ["--save", str(tmp_path / "checkpoints"), "--export-path", str(tmp_path / "export")]
    stopped = run_tool(recipe_file, "--exit-interval", "4", *elsewhere)
    assert stopped.returncode == 2 and "training stopped at step 4 of 9. Run this again" in stopped.stderr
    assert not (tmp_path / "export").exists()


@pytest.fixture
def killable() -> Iterator[KillableRanks]:
    ranks = KillableRanks()
    yield ranks
    ranks.close()


def pretrain(rank: int, recipe_file: Path, save: Path) -> None:
    """The command as a rank, without an interpreter and imports of its own."""
    sys.argv = [str(ROOT / "pretrain_fuse.py"), "--recipe", str(recipe_file), "--save", str(save)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_killed_at_a_random_step_it_continues_as_if_nothing_happened(
    finished: tuple[Path, str], recipe_file: Path, killable: KillableRanks, tmp_path: Path
) -> None:
    workdir, whole = finished
    stop = random.Random().randint(2, 7)

    def start(name: str) -> list[Any]:
        return killable.start(2, tmp_path / name, pretrain, recipe_file, workdir / "killed", torchrun=True)

    def output(name: str) -> str:
        return printed(tmp_path / name)

    (job,) = start("killed")
    while stop not in logged_steps(output("killed")):
        assert job.is_alive(), output("killed")[-4000:]
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    assert killable.wait([job]) == [-signal.SIGKILL]
    killable.wait_for_nothing_left()
    last = max(logged_steps(output("killed")))
    assert killable.wait(start("rest")) == [0], output("rest")[-4000:]
    expected, resumed = logged_steps(whole), logged_steps(output("rest"))
    assert f"at iteration {min(resumed) - 1}" in output("rest")
    assert last - 2 <= min(resumed) <= last + 1, f"killed at step {last}"
    assert resumed == {step: expected[step] for step in resumed} and max(resumed) == 9, (
        f"killed at step {last}"
    )
