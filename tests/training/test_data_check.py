"""Laws of training over damaged data: every rank ends with the same UserError, and No checkpoint was
written.
"""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from log_lines import logged
from synthetic import SyntheticDataset, make_tiny_target
from test_layouts import Recorder, layout, one_report, run_training

from megatron_fuse.errors import UserError
from megatron_fuse.storage import Artifact, Plan, run_plan


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


def artifact(directory: Path, damaged: bool) -> Artifact:
    """What a dataset says that it was read from; damage keeps the size."""

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        prefix.with_name(prefix.name + ".bin").write_bytes(bytes(100))
        return {}

    made = run_plan(Plan(directory, "stage", {}, {}, 3), make_shard)
    assert made is not None
    if damaged:
        (directory / "shard-00001.bin").write_bytes(b"\1" + bytes(99))
    return made


class Dataset(SyntheticDataset):
    """trouble: what its first document raises, as damage may cause it."""

    def __init__(self, made: Artifact, trouble: Exception | None = None) -> None:
        super().__init__()
        self.artifacts, self.trouble = [made], trouble

    def document(self, mode: str, example: int) -> Any:
        if self.trouble:
            raise self.trouble
        return super().document(mode, example)


class Waiting(Recorder):
    """A log whose step `release` lets the comparison begin, which has been waiting."""

    def __init__(self, release: int) -> None:
        super().__init__()
        self.release, self.begin = release, threading.Event()

    def step(self, iteration: int, *arguments: Any) -> None:
        super().step(iteration, *arguments)
        if iteration >= self.release:
            self.begin.set()

    def saved(self, iteration: int) -> None:
        self.begin.set()


def run(
    workdir: Path,
    target: Path,
    sections: dict[str, Any],
    made: Artifact,
    release: int = 0,
    trouble: Exception | None = None,
    local_rank: int | None = None,
) -> tuple[str, list[int], list[str]]:
    """One rank: the UserError that it ended with, the steps that it did, and the checkpoints at its end."""
    log = Waiting(release)
    checked = Artifact.checked

    def wait_and_check(self: Artifact, path: Path, *, checksum: bool = True) -> Path:
        # A minute stands for never: where training waits for the comparison, that begins all the same.
        if checksum and release:
            log.begin.wait(1 if release > 100 else 60)
        return checked(self, path, checksum=checksum)

    if local_rank is not None:
        os.environ["LOCAL_RANK"] = str(local_rank)
    message = ""
    with pytest.MonkeyPatch.context() as patch, logged():
        patch.setattr(Artifact, "checked", wait_and_check)
        patch.setattr("test_layouts.SyntheticDataset", lambda: Dataset(made, trouble))
        try:
            run_training(workdir, target, sections, log)
        except UserError as error:
            message = str(error)
    saved = sorted(path.name for path in (workdir / "training/checkpoints").glob("[!.]*"))
    return message, [step["iteration"] for step in log.steps], saved


@pytest.mark.parametrize(
    ("world_size", "parallel", "release", "asynchronous"),
    [
        pytest.param(1, layout(), 1, False, id="alone"),
        pytest.param(1, layout(), 1000, True, id="the first checkpoint waits"),
        pytest.param(2, layout(tp=2), 2, False, id="tp2"),
        pytest.param(2, layout(), 1000, False, id="dp2: the first checkpoint waits"),
        pytest.param(2, layout(pp=2), 0, True, id="pp2"),
    ],
)
def test_damaged_data_end_a_run_on_all_ranks_before_anything_is_saved(  # type: ignore[no-untyped-def]
    ranks, target, tmp_path, world_size, parallel, release, asynchronous
) -> None:
    made = artifact(tmp_path / "data", damaged=True)
    sections = {
        "parallel": parallel,
        "training": {"train_iters": 6, "async_save": asynchronous, "eval_interval": 100},
    }
    results = ranks(world_size, run, tmp_path, target, sections, made, release)
    for message, steps, saved in results:
        assert message.startswith(f"{tmp_path}/data/shard-00001.bin: the sha256 is ")
        assert "No checkpoint was written from these data" in message and len(message) <= 600
        assert saved == [] and steps == results[0][1]
        assert release > 6 or len(steps) < 6
    if world_size == 1:
        ((message, _, saved),) = ranks(1, run, tmp_path, target, sections, made)
        assert message and saved == []
        ((message, _, saved),) = ranks(
            1, run, tmp_path, target, sections, artifact(tmp_path / "whole", damaged=False)
        )
        assert not message and saved


def test_whole_data_change_nothing_and_no_verify_reads_nothing(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    expected = one_report(ranks(1, run_training, tmp_path / "a", target, {"training": {"train_iters": 3}}))
    made = artifact(tmp_path / "data", damaged=True)
    sections = {"training": {"train_iters": 3, "verify": False}}
    ((message, steps, saved),) = ranks(1, run, tmp_path / "b", target, sections, made)
    assert message == "" and saved
    assert steps == [step["iteration"] for step in expected["steps"]]


@pytest.mark.parametrize("local_rank", [0, 1])
@pytest.mark.parametrize("damaged", [True, False])
def test_what_damage_breaks_first_is_explained_by_it(ranks, target, tmp_path, local_rank, damaged) -> None:  # type: ignore[no-untyped-def]
    """Whether this rank compares from the start or, as other ranks of a node, only now."""
    made = artifact(tmp_path / "data", damaged)
    trouble = UserError("the loss is NaN")
    plan = (
        tmp_path,
        target,
        {"training": {"train_iters": 3}},
        made,
        1000 if local_rank == 0 else 0,
        trouble,
        local_rank,
    )
    ((message, _, saved),) = ranks(1, run, *plan)
    assert saved == []
    assert (
        message.startswith(f"{tmp_path}/data/shard-00001.bin: the sha256 is ")
        if damaged
        else message == str(trouble)
    )
