"""The processes that jobs are forked from, the commands that faults are done to, and where outcomes go."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import outcomes
import pytest
from jobs import Server
from kinds import may_mount, run_case
from plans import plan_targets
from readers import evaluation_target, experiment_target, report_targets, start_evaluation_server
from stages import stage_targets, start_server
from targets import Target

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))  # small_questions

Campaign = Callable[[str, list[Target], int], None]


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """campaign(kind, targets, cases): that many cases over the targets in turn.

    Fails with the seeds that break the law.
    """
    path = os.environ.get("FAULT_OUTCOMES")
    if path:
        outcomes.write_rows(Path(path), [outcomes.head()])

    def run(kind: str, targets: list[Target], cases: int) -> None:
        if kind == "full" and not may_mount(tmp_path_factory.mktemp("small")):
            pytest.skip("only root may mount a small file system")
        rows = []
        for case in range(cases):
            rows.append(run_case(kind, targets[case % len(targets)], f"{outcomes.SEED}-{case}"))
            if path:
                outcomes.write_rows(Path(path), rows[-1:])
        broken = [
            f"{row['target']}, {kind}, seed {row['seed']}: {row['problem']}" for row in rows if row["problem"]
        ]
        assert not broken, f"{len(broken)} of {cases}:\n" + "\n".join(broken[:10])

    return run


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    server = Server(["megatron_fuse.storage"])
    yield plan_targets(server, tmp_path_factory.mktemp("plans"))
    server.close()


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """The process that has imported torch and transformers, and the directory of the recipe that it has
    made.
    """
    root = tmp_path_factory.mktemp("stages")
    server = start_server(root)
    yield server, root
    server.close()


@pytest.fixture(scope="session")
def stages(large: tuple[Server, Path]) -> dict[str, Target]:
    return stage_targets(*large)


@pytest.fixture(scope="session")
def reports(large: tuple[Server, Path], stages: dict[str, Target]) -> dict[str, Target]:
    return report_targets(*large)


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megatron-fuse[eval]'")
    root = tmp_path_factory.mktemp("evaluation")
    server = start_evaluation_server(root)
    yield evaluation_target(server, root)
    server.close()


@pytest.fixture(scope="session")
def experiment(large: tuple[Server, Path], tmp_path_factory: pytest.TempPathFactory) -> Target:
    return experiment_target(large[0], tmp_path_factory.mktemp("experiment") / "root")
