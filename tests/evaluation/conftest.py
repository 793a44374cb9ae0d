"""Models and questions of the evaluation's tests, and the tool in this process."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fuse.evaluation import EvaluatedModel, harness

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of every benchmark; to be read."""
    from small_questions import write_questions  # brings torch, which most tests do without

    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> list[EvaluatedModel]:
    """Random models of two architectures; to be read."""
    from small_questions import small_model

    directory = tmp_path_factory.mktemp("models")
    return [small_model(directory / "alpha", "llama", 1), small_model(directory / "beta", "gpt_neox", 2)]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(harness, "load_model", load_model)


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs tools/evaluate.py with these arguments; its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code

    return run
