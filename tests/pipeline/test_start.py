"""What is refused before the first stage of a run."""

from pathlib import Path

import pytest

from megatron_fuse.errors import UserError
from megatron_fuse.pipeline import start
from megatron_fuse.recipe import make_recipe

TWO = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("parallel", "processes", "said"),
    [
        ({"tensor_model_parallel_size": 2}, 3, r"must be a multiple of 2 \(tensor x pipeline"),
        ({"expert_model_parallel_size": 4}, 2, r"must be a multiple of 4 \(expert_model_parallel_size x"),
        (
            {
                "tensor_model_parallel_size": 2,
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 2,
            },
            2,
            r"must be a multiple of 4 \(expert_model_parallel_size x",
        ),
        (
            {
                "tensor_model_parallel_size": 2,
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
            },
            2,
            None,
        ),
        ({}, 5000, "at most 4096"),
    ],
)
def test_processes_that_do_not_fit_are_refused_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parallel: dict[str, int],
    processes: int,
    said: str | None,
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(start, "check_files", lambda recipe: None)
    monkeypatch.setattr(start, "run_recipe", lambda *arguments: ran.append(arguments))
    recipe = make_recipe(
        {
            "workdir": str(tmp_path),
            "target": {"model": "target"},
            "sources": {"a": {"model": "source"}},
            "data": {"path": "data.jsonl"},
            "schedule": {"preset": "csft"},
            "parallel": parallel,
        }
    )
    if said is None:
        start.start_recipe(recipe, processes)
        assert len(ran) == 1
        return
    with pytest.raises(UserError, match=said):
        start.start_recipe(recipe, processes)
    assert not ran
