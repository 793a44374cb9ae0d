"""The campaign finds what breaks the law: a reader for each way to break it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import campaign
import pytest
from campaign import FuzzTarget, run_campaign

from megatron_fuse.errors import UserError


def whole(directory: Path) -> bool:
    path = directory / "a.json"
    return path.is_file() and path.read_text() == '{"key": 1}'


def refuse(directory: Path) -> None:
    raise UserError(f"{directory / 'a.json'}:1: key is wrong")


def refuse_at_length(directory: Path) -> None:
    raise UserError(f"{directory / 'a.json'}:1: key is wrong" + "x" * 600)


def refuse_namelessly(directory: Path) -> None:
    raise UserError("something is wrong")


def crash(directory: Path) -> None:
    raise KeyError("files")


def loop(directory: Path) -> None:
    while True:
        try:
            time.process_time()
        except Exception:
            continue


def hang(directory: Path) -> None:
    while True:
        try:
            time.sleep(1)
        except BaseException:
            continue


def fill(directory: Path) -> None:
    bytearray(3 << 30)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda directory: None, "accepted"),
        (refuse, "refused"),
        (refuse_at_length, "message"),
        (refuse_namelessly, "message"),
        (crash, "traceback"),
        (lambda directory: os.abort(), "killed"),
        (lambda directory: os._exit(0), "killed"),
        (loop, "time"),
        (hang, "killed"),
        (fill, "memory"),
    ],
)
def test_every_end_is_known(
    end: Callable[[Path], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "CASE_SECONDS", 0.2)
    monkeypatch.setattr(campaign, "_SILENT_SECONDS", 1)
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds/a.json").write_text('{"key": 1}')
    target = FuzzTarget(
        "law", lambda directory: None, lambda directory: None if whole(directory) else end(directory)
    )
    result = run_campaign(target, tmp_path / "seeds", tmp_path, seed=1, cases=range(3))
    assert result.counts == {kind: 3}
    assert len(result.faults) == (0 if kind in ("accepted", "refused") else 3)
