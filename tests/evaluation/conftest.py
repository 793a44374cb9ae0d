"""Models and questions of the evaluation's tests."""

from pathlib import Path

import pytest

from megatron_fuse.evaluation import EvaluatedModel


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
