"""Fixtures of all tests."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from rank_pool import COLLECTED, WITHOUT_GPU, RankPool, forked

from megatron_fuse.recipe import Recipe

# In the background of a shell; children would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A case has no deadline: how long it takes depends on what else the machine does.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU, those of the kernels alone (`pytest tests/kernels`) on a GPU if one is visible.

    Before anything asks CUDA, or imports triton, which reads TRITON_INTERPRET then.
    """
    kernels = Path(__file__).parent / "kernels"
    of_kernels = config.args and all(
        kernels in (path := place_of(argument), *path.parents) for argument in config.args
    )
    visible = Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in (
        "",
        "-1",
    )
    if not (of_kernels and visible):
        os.environ.update(WITHOUT_GPU)


def place_of(argument: str) -> Path:
    """The file or directory of a test's name on the command line."""
    return Path(argument.partition("::")[0]).resolve()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports make millions of objects that stay, and tests import more.

    The collector would scan them at every full collection, for a second each time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(*COLLECTED)
        gc.enable()


# Files that take longest, in this order. They begin first, so that no process still has a long one when the
# others have ended.
LONGEST = (
    "training/test_layouts.py",
    "kernels/test_triton.py",
    "test_end_to_end.py",
    "training/test_killed_training.py",
    "gpu_checks/test_gpu_checks.py",
    "training/test_checkpoint.py",
    "training/test_two_trainings.py",
    "faults/test_faults.py",
    "kernels/test_topk.py",
    "kernels/test_fused_linear.py",
    "fuzz/test_fuzz.py",
    "training/test_interrupted_training.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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
def apart(cache: None) -> Iterator[Callable[..., Any]]:
    """apart(function, *arguments): its result, of a process of its own, for what changes torch for the
    rest of a process's life.
    """
    with ProcessPoolExecutor(1, mp_context=forked()) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


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
