"""A checkpoint is whole or absent, fits only its own model and run, and exports what was trained."""

import functools
import importlib.metadata
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from log_lines import logged
from synthetic import make_tiny_target
from test_layouts import layout, one_report, run_training
from transformers import AutoModelForCausalLM

from megatron_fuse.training.export import export_checkpoint


def message_of_refusal(workdir: Path, target: Path, sections: dict[str, Any]) -> str:
    from megatron_fuse.errors import UserError

    try:
        run_training(workdir, target, sections)
    except UserError as error:
        return str(error)
    return "accepted"


def message_with_short_files(workdir: Path, target: Path, sections: dict[str, Any], largest: int) -> str:
    """The refusal of a run whose processes, the writers among them, cannot write a file beyond `largest`
    bytes.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        return message_of_refusal(workdir, target, sections)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def run_without_entry_points(workdir: Path, target: Path, sections: dict[str, Any]) -> Any:
    """run_training in which Megatron's own `save` and `load`, whose parameters change from version to
    version, cannot be called.
    """
    from megatron.core import dist_checkpointing

    with patch.object(dist_checkpointing, "save", None), patch.object(dist_checkpointing, "load", None):
        return run_training(workdir, target, sections)


def import_at(model_dir: Path, output: Path) -> None:
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training.target import import_hugging_face

    start_runtime()
    import_hugging_face(model_dir, output)


@pytest.fixture(scope="module")
def odd(ranks, tmp_path_factory) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
    """A target with 1003 tokens, padded to 1024 columns, trained three steps at TP=2 x DP=2."""
    directory = tmp_path_factory.mktemp("odd")
    target = make_tiny_target(directory / "target", vocab_size=1003)
    sections = {"parallel": layout(tp=2, use_distributed_optimizer=True), "training": {"train_iters": 3}}
    ranks(4, run_training, directory / "work", target, sections)
    return directory / "work", target


def checkpoints(workdir: Path) -> Path:
    return workdir / "training/checkpoints"


@pytest.mark.parametrize(("world_size", "parallel"), [(1, layout()), (2, layout(pp=2))], ids=["tp1", "pp2"])
def test_an_odd_vocabulary_loads_at_other_layouts(ranks, odd, tmp_path, world_size, parallel) -> None:  # type: ignore[no-untyped-def]
    workdir, target = odd
    sections = {
        "parallel": {**parallel, "use_distributed_optimizer": True},
        "training": {"train_iters": 4, "load": str(checkpoints(workdir)), "save": str(tmp_path)},
    }
    report = one_report(ranks(world_size, run_training, workdir, target, sections))
    assert [step["iteration"] for step in report["steps"]] == [4]


def test_a_run_in_bf16_continues(ranks, odd, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """With the losses that it would have had in one go."""
    training = {"precision": "bf16", "train_iters": 5}
    whole = one_report(ranks(1, run_training, tmp_path / "whole", odd[1], {"training": training}))
    ranks(1, run_training, tmp_path / "parted", odd[1], {"training": {**training, "train_iters": 3}})
    rest = one_report(ranks(1, run_training, tmp_path / "parted", odd[1], {"training": training}))
    assert [step["iteration"] for step in rest["steps"]] == [4, 5]
    assert rest["steps"] == whole["steps"][3:]


def test_checkpoints_do_without_megatrons_own_entry_points(ranks, odd, tmp_path) -> None:  # type: ignore[no-untyped-def]
    sections = {
        "parallel": {**layout(), "use_distributed_optimizer": True},
        "training": {"train_iters": 4, "load": str(checkpoints(odd[0])), "save": str(tmp_path)},
    }
    report = one_report(ranks(1, run_without_entry_points, *odd, sections))
    assert [step["iteration"] for step in report["steps"]] == [4] and (
        tmp_path / "iter_0000004/common.pt"
    ).exists()


# 1024 and 1003 are padded alike: Megatron alone would load it and leave 21 rows of zeros
@pytest.mark.parametrize(
    ("vocab_size", "tied", "key"),
    [(1024, False, "vocab_size"), (1003, True, "tied_embeddings")],
    ids=["1024", "tied"],
)
def test_another_model_is_refused(ranks, odd, tmp_path, vocab_size, tied, key) -> None:  # type: ignore[no-untyped-def]
    other = make_tiny_target(tmp_path / "other", vocab_size=vocab_size, tied=tied)
    (message,) = ranks(1, message_of_refusal, odd[0], other, {})
    assert str(checkpoints(odd[0])) in message and f"{key} = " in message


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        (
            {"training": {"global_batch_size": 4}},
            "global_batch_size = 8, but this run has global_batch_size = 4",
        ),
        ({"schedule": {"preset": "csft"}}, "phases = "),
        ({"loss": {"tail": "ignore"}}, "loss = "),
    ],
)
def test_another_run_is_refused(ranks, odd, sections, key) -> None:  # type: ignore[no-untyped-def]
    (message,) = ranks(1, message_of_refusal, odd[0], odd[1], sections)
    assert key in message and "another --save" in message


def test_a_load_directory_without_checkpoint_is_refused(ranks, odd, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (message,) = ranks(1, message_of_refusal, odd[0], odd[1], {"training": {"load": str(tmp_path)}})
    assert f"--load {tmp_path}" in message


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_failed_save_leaves_the_last_checkpoint(ranks, odd, tmp_path, asynchronous) -> None:  # type: ignore[no-untyped-def]
    workdir, target = odd
    save = {"load": str(checkpoints(workdir)), "save": str(tmp_path), "async_save": asynchronous}
    parallel = layout(tp=2, use_distributed_optimizer=True)
    ranks(2, run_training, workdir, target, {"parallel": parallel, "training": {**save, "train_iters": 4}})
    further = {"parallel": parallel, "training": {**save, "load": str(tmp_path), "train_iters": 5}}
    # 64 KiB: what rank 0 alone writes still fits, what every rank writes of the weights does not
    messages = ranks(2, message_with_short_files, workdir, target, further, 1 << 16)
    for message in messages:
        assert f"{tmp_path}: the checkpoint cannot be written" in message and "are free there" in message
    assert any("File too large" in message for message in messages)
    assert [path.name for path in tmp_path.glob("*iter_0*")] == ["iter_0000004"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4\n"
    report = one_report(ranks(2, run_training, workdir, target, further))
    assert [step["iteration"] for step in report["steps"]] == [5]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for three checkpoints of the tiny target and no fourth."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_is_named_with_the_room_that_is_wanted(ranks, small_disk, tmp_path) -> None:  # type: ignore[no-untyped-def]
    target = make_tiny_target(tmp_path / "target", layers=4)
    training = {"save": str(small_disk), "save_interval": 1, "train_iters": 6}
    (message,) = ranks(1, message_of_refusal, tmp_path / "work", target, {"training": training})
    assert f"{small_disk}: the checkpoint cannot be written" in message and "MB are free there" in message
    kept = sorted(path.name for path in small_disk.iterdir())
    latest = (small_disk / "latest_checkpointed_iteration.txt").read_text().strip()
    assert f"iter_{int(latest):07d}" == kept[-2] and not any(name.startswith(".") for name in kept)
    # With room made, and no more than two checkpoints at a time from then on, the same run goes through.
    shutil.rmtree(small_disk / kept[0])
    training["save_retain_last"] = 1
    (message,) = ranks(1, message_of_refusal, tmp_path / "work", target, {"training": training})
    assert message == "accepted"
    assert {path.name for path in small_disk.glob("*iter_0*")} == {"iter_0000006"}


def run_and_return_output(workdir: Path, target: Path, sections: dict[str, Any]) -> str:

    with logged() as output:
        run_training(workdir, target, sections)
    return output.getvalue()


def test_another_run_is_continued_where_it_is_asked_for(ranks, odd, tmp_path) -> None:  # type: ignore[no-untyped-def]
    changed = {
        "parallel": {"use_distributed_optimizer": True},
        "loss": {"tail": "ignore"},
        "training": {"load": str(checkpoints(odd[0])), "save": str(tmp_path), "lr": 1e-4, "train_iters": 4},
    }
    (refusal,) = ranks(1, message_of_refusal, *odd, changed)
    assert "loss = " in refusal and "step = " in refusal and "--override" in refusal
    changed["training"]["override"] = True
    (output,) = ranks(1, run_and_return_output, *odd, changed)
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and "loss = " in warnings[0] and "'lr': 0.0001" in warnings[1]
    # The new checkpoint is of the new run.
    del changed["training"]["override"]
    changed["training"] |= {"load": str(tmp_path), "train_iters": 5}
    assert ranks(1, message_of_refusal, *odd, changed) == ["accepted"]


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"parallel": {"use_distributed_optimizer": False}}, "use_distributed_optimizer"),
        ({"training": {"precision": "bf16"}}, "precision"),
    ],
)
def test_an_optimizer_of_another_form_is_refused(ranks, odd, sections, key) -> None:  # type: ignore[no-untyped-def]
    """Megatron keeps its state under other names then; not even --override makes it fit."""
    parallel = {"use_distributed_optimizer": True} | sections.get("parallel", {})
    training = {"override": True} | sections.get("training", {})
    (message,) = ranks(1, message_of_refusal, *odd, {"parallel": parallel, "training": training})
    assert f"optimizer has {key} = " in message and "Restore the old value" in message


def test_a_library_of_another_version_is_a_warning(ranks, odd, tmp_path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(checkpoints(odd[0]), tmp_path / "old")
    metadata = tmp_path / "old/iter_0000003/facts.json"
    metadata.write_text(re.sub(r'"torch": "[^"]*"', '"torch": "1.0"', metadata.read_text()))
    (metadata.parent / "checksums.json").unlink()
    training = {
        "verify": False,
        "load": str(tmp_path / "old"),
        "save": str(tmp_path / "new"),
        "train_iters": 4,
    }
    sections = {"parallel": {"use_distributed_optimizer": True}, "training": training}
    (output,) = ranks(1, run_and_return_output, *odd, sections)
    assert "warning: " in output and "has torch = '1.0', but this run has torch = " in output


@given(
    iterations=st.sets(st.integers(0, 40)),
    newest=st.integers(1, 40),
    named=st.sets(st.integers(0, 40)),
    last=st.none() | st.integers(1, 6),
    interval=st.none() | st.integers(1, 9),
)
def test_what_expires(
    iterations: set[int], newest: int, named: set[int], last: int | None, interval: int | None
) -> None:
    from megatron_fuse.training.checkpoint_files import Retention

    expired = set(Retention(last, interval).expired(iterations, newest, named))
    assert expired <= {iteration for iteration in iterations if 0 < iteration < newest} - named
    newer = {one: sum(one < other <= newest for other in iterations | {newest}) for one in iterations}
    for iteration in {one for one in iterations if 0 < one < newest} - named:
        kept = (last is None and interval is None) or newer[iteration] < (last or 1)
        assert (iteration in expired) == (not kept and (interval is None or iteration % interval != 0))


def run_best_at_four(workdir: Path, target: Path, sections: dict[str, Any]) -> None:
    """A run whose validation loss falls to step 4 and rises from there on."""
    from megatron_fuse.training import trainer

    evaluate = trainer._evaluate
    trainer._evaluate = lambda _, iteration: float(abs(iteration - 4))
    try:
        run_training(workdir, target, sections)
    finally:
        trainer._evaluate = evaluate


def test_old_checkpoints_go_and_the_best_stays(ranks, tmp_path) -> None:  # type: ignore[no-untyped-def]
    target = make_tiny_target(tmp_path / "target")
    training = {
        "save_interval": 1,
        "eval_interval": 2,
        "train_iters": 12,
        "save_retain_last": 2,
        "save_retain_interval": 5,
    }
    ranks(1, run_best_at_four, tmp_path / "work", target, {"training": training})
    directory = checkpoints(tmp_path / "work")
    assert (directory / "best_checkpointed_iteration.txt").read_text() == "4\n"
    found = {int(path.name.removeprefix("iter_")) for path in directory.glob("*iter_*") if path.is_dir()}
    assert found == {4, 5, 10, 11, 12}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_checkpoint_of_any_layout_exports(odd, tmp_path, dtype) -> None:  # type: ignore[no-untyped-def]
    workdir, target = odd
    export_checkpoint(checkpoints(workdir) / "iter_0000003", target, tmp_path / "model", dtype)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    before = AutoModelForCausalLM.from_pretrained(target)
    assert exported.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for (name, a), b in zip(exported.named_parameters(), before.parameters(), strict=True):
        # three steps of at most lr = 1e-3 each; every matrix moved, and none is noise
        assert a.shape == b.shape and (a.float() - b).abs().max() < 3e-3 + 0.01 * b.abs().max(), name
        assert not torch.equal(a.float(), b), name


def test_an_imported_model_exports_bit_for_bit(ranks, odd, tmp_path) -> None:  # type: ignore[no-untyped-def]
    target = odd[1]
    ranks(1, import_at, target, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint/iter_0000000", target, tmp_path / "model", "fp32")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (target, tmp_path / "model")]
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)


def saved_and_loaded(directory: Path, target: Path, *, extra_on_save: bool) -> bool:
    """Whether weights come back where layers with a state beside their weights, as Transformer Engine's
    have, save or load.
    """
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training.checkpoint import load_checkpoint, save_checkpoint
    from megatron_fuse.training.checkpoint_metadata import CheckpointMetadata, model_identity
    from megatron_fuse.training.target import _whole_model

    start_runtime()
    architecture, chunks = _whole_model(target)
    norm = chunks[0].decoder.final_layernorm
    plain = type(norm)

    class WithExtraState(plain):  # type: ignore[misc, valid-type]
        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(1)

        def set_extra_state(self, state: object) -> None:
            raise AssertionError("the scales of fp8 are not part of a checkpoint")

    kinds = (WithExtraState, plain) if extra_on_save else (plain, WithExtraState)
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter)
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    norm.__class__ = kinds[0]
    metadata = CheckpointMetadata(0, 0, model_identity(architecture), {}, None, {})
    path = save_checkpoint(directory, chunks, None, metadata)
    for parameter in chunks[0].parameters():
        torch.nn.init.zeros_(parameter)
    norm.__class__ = kinds[1]
    load_checkpoint(path, chunks, None, architecture)
    return all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))


@pytest.mark.parametrize("extra_on_save", [True, False])
def test_checkpoints_move_between_layers_with_and_without_extra_state(
    ranks, odd, tmp_path, extra_on_save
) -> None:  # type: ignore[no-untyped-def]
    save = functools.partial(saved_and_loaded, extra_on_save=extra_on_save)
    assert ranks(1, save, tmp_path / "checkpoints", odd[1]) == [True]


def test_numbered_extra_states_of_experts_are_left_out() -> None:
    """Transformer Engine's grouped experts number them from the second on."""
    from megatron_fuse.training.checkpoint import _without_extra_state

    experts = "decoder.layers.0.mlp.experts.linear_fc1"
    extra = [
        "_extra_state",
        f"{experts}._extra_state",
        f"{experts}._extra_state1",
        f"{experts}._extra_state17",
    ]
    weights = [f"{experts}.weight1", "decoder.final_layernorm.weight", "an_extra_state.weight"]
    assert list(_without_extra_state(dict.fromkeys(extra + weights))) == weights


def test_a_source_tree_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_fuse.training import checkpoint_metadata

    def version(package: str) -> str:
        if package == "megatron-fuse":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert checkpoint_metadata.versions() == {
        "megatron-fuse": "not installed",
        "torch": "1.2",
        "megatron-core": "1.2",
    }
