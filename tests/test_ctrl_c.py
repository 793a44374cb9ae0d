"""Ctrl-C ends every command with 130 and one line, and what the command has started with it.

Real processes, real signals.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
LINE = "interrupted: finished work is kept. Run the same command again to continue.\n"

# A command that says when it has begun, and then works until it is stopped.
COMMAND = """
import megatron_fuse.start
import os, sys, time
from megatron_fuse.errors import exit_code
def main():
    print("began", os.getpid(), flush=True)
    {work}
if __name__ == "__main__":
    raise SystemExit(exit_code(main))
"""
STARTS = """
    from megatron_fuse.processes import run_tied
    code = run_tied([sys.executable, {launcher}{script!r}])
    print("ended", code)
"""


def script(path: Path, work: str = "time.sleep(60)") -> Path:
    path.write_text(COMMAND.format(work=work.strip()))
    return path


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    """In a group of its own, as a shell starts it; SIGINT is not ignored, as it is where a test runs in
    the background.
    """
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("MEGATRON_FUSE")}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def began(process: subprocess.Popen[str], count: int = 1) -> list[int]:
    """Process ids of so many commands, once they have begun."""
    lines = [process.stdout.readline() for _ in range(count)]
    if not all(line.startswith("began ") for line in lines):
        process.kill()
        pytest.fail(f"{lines}: {process.stderr.read()}")
    return [int(line.split()[1]) for line in lines]


def to_group(process: subprocess.Popen[str], number: int) -> None:
    """As a terminal does."""
    os.killpg(process.pid, number)


def to_one(process: subprocess.Popen[str], number: int) -> None:
    """As a supervisor does."""
    process.send_signal(number)


def ended(process: subprocess.Popen[str], pids: list[int]) -> tuple[int, str]:
    """Exit code and stderr, once all of these have gone."""
    _, error = process.communicate(timeout=300)
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.05)
    return process.returncode, error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_ends_with_one_line(tmp_path: Path, number: int, code: int) -> None:
    process = start(script(tmp_path / "command.py"))
    pids = began(process)
    to_one(process, number)
    wanted = LINE if number == signal.SIGINT else LINE.replace("interrupted", "ended by SIGTERM")
    assert ended(process, pids) == (code, wanted)


# A connection or pool that the interrupt breaks raises its own exception; threads and children would be
# waited for.
@pytest.mark.parametrize(
    "work",
    [
        "\n    try: time.sleep(60)\n    finally: raise RuntimeError('connection closed by peer')",
        "\n    import asyncio\n    async def wait():\n        async with asyncio.TaskGroup() as group:\n"
        "            for _ in range(3): group.create_task(asyncio.sleep(60))\n    asyncio.run(wait())",
        "\n    import multiprocessing\n    with multiprocessing.get_context('fork').Pool(2) as pool: "
        "pool.map(time.sleep, [60, 60])",
    ],
    ids=["broken connection", "requests", "pool"],
)
def test_nothing_else_is_said_or_waited_for(tmp_path: Path, work: str) -> None:
    process = start(script(tmp_path / "command.py", work))
    pids = began(process)
    time.sleep(0.5)  # for the pool to have begun
    to_group(process, signal.SIGINT)
    assert ended(process, pids) == (130, LINE)


def test_an_interrupt_during_the_imports_ends_with_the_same_line(tmp_path: Path) -> None:
    text = COMMAND.format(work="").replace(
        "def main", 'print("began", os.getpid(), flush=True); time.sleep(60)\ndef main'
    )
    (tmp_path / "command.py").write_text(text)
    process = start(tmp_path / "command.py")
    pids = began(process)
    to_one(process, signal.SIGINT)
    assert ended(process, pids) == (130, LINE)


# A library that catches what its imports raise would lose a KeyboardInterrupt.
IMPORTS = """
    from megatron_fuse.start import importing
    with importing():
        try: time.sleep(60)
        except BaseException: print("lost")
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_so_does_one_during_the_imports_within_a_command(tmp_path: Path, number: int, code: int) -> None:
    process = start(script(tmp_path / "command.py", IMPORTS))
    pids = began(process)
    time.sleep(0.5)  # for it to be within the block; before, it ends in the same way
    to_one(process, number)
    assert ended(process, pids) == (
        code,
        LINE if number == signal.SIGINT else LINE.replace("interrupted", "ended by SIGTERM"),
    )


@pytest.mark.parametrize("reach", [to_group, to_one])
def test_what_a_command_has_started_ends_with_it_and_keeps_silent(
    tmp_path: Path, reach: Callable[[subprocess.Popen[str], int], None]
) -> None:
    inner = script(tmp_path / "inner.py")
    process = start(script(tmp_path / "outer.py", STARTS.format(launcher="", script=str(inner))))
    pids = began(process) + began(process)
    reach(process, signal.SIGINT)
    assert ended(process, pids) == (130, LINE)


def test_a_command_whose_part_was_interrupted_ends_too(tmp_path: Path) -> None:
    inner = script(tmp_path / "inner.py")
    process = start(script(tmp_path / "outer.py", STARTS.format(launcher="", script=str(inner))))
    pids = began(process) + began(process)
    os.kill(pids[1], signal.SIGINT)
    assert ended(process, pids) == (130, LINE)


EXPERIMENT = """
    import megatron_fuse.experiments.fork_server
    from pathlib import Path
    from megatron_fuse.experiments.layers import load_experiment
    from megatron_fuse.experiments.runner import run_experiment
    megatron_fuse.experiments.fork_server.LIBRARIES = ()
    path = Path({path!r})
    run_experiment(load_experiment(path), path, jobs=3)
"""
# Says that it has begun where the test reads it, not into the run's log.
MEASURE = """
import os, sys, time
with open({said!r}, "a") as file: print("began", os.getpid(), file=file)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("reach", "program"),
    [
        (to_one, "python"),
        pytest.param(to_group, "python", marks=pytest.mark.slow),
        pytest.param(to_one, "sh", marks=pytest.mark.slow),
        pytest.param(to_group, "sh", marks=pytest.mark.slow),
    ],
)
def test_an_experiment_ends_with_all_its_runs(
    tmp_path: Path, reach: Callable[[subprocess.Popen[str], int], None], program: str
) -> None:
    """Scripts are forked, other programs started.

    Three runs go on side by side; three more wait, and never begin.
    """
    said = tmp_path / "said"
    (tmp_path / "measure.py").write_text(MEASURE.format(said=str(said)))
    (tmp_path / "measure.sh").write_text(f"exec {sys.executable} {tmp_path}/measure.py\n")
    (tmp_path / "recipe.yaml").write_text(
        "{workdir: w, target: {model: t}, sources: {a: {model: a}}, data: {path: d}, schedule: {preset: "
        "csft}}"
    )
    content = {
        "recipe": f"{tmp_path}/recipe.yaml",
        "workdir": f"{tmp_path}/work",
        "results": f"{tmp_path}/results.csv",
        "seeds": [1, 2, 3, 4, 5, 6],
        "evaluate": f"{program} {tmp_path}/measure.{program[:2]} {{model}} {{output}}",
        "metrics": {"right": "right"},
        "models": {"m": "m"},
        "variants": {},
        "tables": {"main": {"title": "All", "rows": ["m"], "baseline": "m"}},
    }
    (tmp_path / "experiment.yaml").write_text(json.dumps(content))
    said.write_text("")
    process = start(script(tmp_path / "command.py", EXPERIMENT.format(path=f"{tmp_path}/experiment.yaml")))
    pids = began(process)
    deadline = time.monotonic() + 240
    while len(lines := said.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    reach(process, signal.SIGINT)
    assert ended(process, pids + [int(line.split()[1]) for line in lines]) == (130, LINE)
    assert len(said.read_text().splitlines()) == 3


@pytest.mark.parametrize("reach", [to_group, pytest.param(to_one, marks=pytest.mark.slow)])
def test_the_first_rank_of_torchrun_speaks_alone(
    tmp_path: Path, reach: Callable[[subprocess.Popen[str], int], None]
) -> None:
    process = start(
        "-m", "megatron_fuse.torchrun", "--standalone", "--nproc-per-node=2", script(tmp_path / "rank.py")
    )
    pids = began(process, 2)
    reach(process, signal.SIGINT)
    assert ended(process, pids) == (130, LINE)


def test_every_command_goes_through_the_door() -> None:
    commands = [*ROOT.glob("tools/*.py"), ROOT / "pretrain_fuse.py", *ROOT.glob("examples/*/*.py")]
    commands += [ROOT / "megatron_fuse/pretrain.py", ROOT / "megatron_fuse/cli/__main__.py"]
    texts = {path: path.read_text() for path in commands}
    texts = {path: text for path, text in texts.items() if "__main__" in text}
    assert len(texts) >= 20
    for path, text in texts.items():
        assert text.endswith('if __name__ == "__main__":\n    raise SystemExit(exit_code(main))\n'), path
        if path.parent.parent.name != "examples":
            imported = re.findall(r"^(?:import|from) ([\w.]+)", text, re.M)
            first = next(name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names)
            assert first == "megatron_fuse.start", path
    for path in ROOT.glob("benchmarks/*.py"):
        if "__main__" in (text := path.read_text()):
            assert "exit_code(main)" in text or re.search(r"\b(run|run_all)\(", text), path
