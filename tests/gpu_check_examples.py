"""Checks for tests of what runs checks: one module that is many, by the name of the check."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_fuse.gpu_checks.rows import Row, held, measured, not_run


def run(device: str, directory: Path) -> Iterator[Row]:
    yield measured("device", device)
    print("said by", directory.name, flush=True)
    (directory / "file").touch()
    yield from globals()[directory.name.partition("-")[0]](directory)


def good(directory: Path) -> Iterator[Row]:
    yield held("speed", 5.0, "km/h", ">= 4")
    yield not_run("a | b", "of another machine")


def slow(directory: Path) -> Iterator[Row]:
    yield held("speed", 3.0, "km/h", ">= 4")


def undefined(directory: Path) -> Iterator[Row]:
    yield held("ratio", float("nan"), "", "<= 4")
    yield measured("rate", float("inf"))


def crashing(directory: Path) -> Iterator[Row]:
    yield measured("before", 1.0)
    raise RuntimeError("broken in the middle")


def killed(directory: Path) -> Iterator[Row]:
    yield measured("before", 1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(directory: Path) -> Iterator[Row]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield measured("child", child.pid)
    time.sleep(600)
