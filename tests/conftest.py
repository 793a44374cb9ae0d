"""Fixtures of all tests."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_pool import RankPool

from megatron_fuse.recipe import Recipe

if not os.path.exists("/dev/nvidiactl"):  # without a GPU Triton's kernels are interpreted; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tests find about their files does not go into the user's cache directory."""
    os.environ["MEGATRON_FUSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ranks(cache: None) -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """All stages before training, over the small world of small_fusion; to be read."""
    from small_fusion import build_world  # brings torch and transformers, which most tests do without

    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def copied(world: Recipe, tmp_path: Path) -> Recipe:
    """The world in a directory of the test's own, to be changed or damaged."""
    shutil.copytree(world.workdir, tmp_path / "run")
    return world.model_copy(update={"workdir": tmp_path / "run"})
