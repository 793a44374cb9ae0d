"""A checkpoint is whole or absent, fits only its own model and run, and exports what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import make_tiny_target
from test_layouts import layout, one_report, run_training
from transformers import AutoModelForCausalLM


def message_of_refusal(workdir: Path, target: Path, sections: dict[str, Any]) -> str:
    from megatron_fuse.errors import UserError

    try:
        run_training(workdir, target, sections)
    except UserError as error:
        return str(error)
    return "accepted"


def fail_while_saving(workdir: Path, target: Path) -> str | None:
    """Trains one step further than the checkpoint there, with a disk that is full in the middle of the save."""
    from megatron_fuse.training import checkpoint

    save = checkpoint.dist_checkpointing.save

    def half_a_save(state: dict, directory: str) -> None:
        (Path(directory) / "half.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    checkpoint.dist_checkpointing.save = half_a_save
    try:
        run_training(workdir, target, {"training": {"train_iters": 4}})
    except OSError as error:
        return str(error)
    finally:
        checkpoint.dist_checkpointing.save = save
    return None


def export(checkpoint: Path, target: Path, output: Path, dtype: str) -> None:
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training.target import export_checkpoint

    start_runtime()
    export_checkpoint(checkpoint, target, output, dtype)


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


# 1024 and 1003 are padded alike: Megatron alone would load it and leave 21 rows of zeros
@pytest.mark.parametrize(
    ("vocab_size", "tied", "key"), [(1024, False, "vocab_size"), (1003, True, "tied_embeddings")], ids=["1024", "tied"]
)
def test_another_model_is_refused(ranks, odd, tmp_path, vocab_size, tied, key) -> None:  # type: ignore[no-untyped-def]
    other = make_tiny_target(tmp_path / "other", vocab_size=vocab_size, tied=tied)
    (message,) = ranks(1, message_of_refusal, odd[0], other, {})
    assert str(checkpoints(odd[0])) in message and f"{key} = " in message


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"training": {"global_batch_size": 4}}, "global_batch_size = 8, this run has global_batch_size = 4"),
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


def test_a_failed_save_leaves_the_last_checkpoint(ranks, tmp_path) -> None:  # type: ignore[no-untyped-def]
    target = make_tiny_target(tmp_path / "target")
    ranks(1, run_training, tmp_path / "work", target, {"training": {"train_iters": 3}})
    (message,) = ranks(1, fail_while_saving, tmp_path / "work", target)
    assert message is not None and "No space left" in message
    directory = checkpoints(tmp_path / "work")
    assert (directory / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert [path.name for path in directory.glob("iter_*")] == ["iter_0000003"]
    report = one_report(ranks(1, run_training, tmp_path / "work", target, {"training": {"train_iters": 4}}))
    assert [step["iteration"] for step in report["steps"]] == [4]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_checkpoint_of_any_layout_exports(ranks, odd, tmp_path, dtype) -> None:  # type: ignore[no-untyped-def]
    workdir, target = odd
    ranks(1, export, checkpoints(workdir) / "iter_0000003", target, tmp_path / "model", dtype)
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
    ranks(1, export, tmp_path / "checkpoint/iter_0000000", target, tmp_path / "model", "fp32")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (target, tmp_path / "model")]
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)
