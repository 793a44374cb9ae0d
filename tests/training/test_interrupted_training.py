"""A run that gets a signal stops on all ranks with a checkpoint, and one that is killed at any moment
loses no step twice.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from log_lines import logged
from synthetic import make_tiny_target
from test_layouts import Recorder, layout, one_report, run_training

LATEST = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass
class Sender(Recorder):
    """A log in which this process sends itself a signal, as a batch system would between the first step
    and its end.
    """

    number: int = 0
    at: int = 1

    def step(self, iteration: int, *arguments: Any) -> None:
        super().step(iteration, *arguments)
        if iteration == self.at and self.number:
            os.kill(os.getpid(), self.number)


def run_and_signal(
    workdir: Path, target: Path, sections: dict[str, Any], number: int, receiver: int
) -> tuple[list[int], str, bool]:
    """One rank: iterations done, what it printed, and whether the handlers are again those from before."""
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    receives = int(os.environ["RANK"]) == receiver
    log = Sender(number=number if receives else 0, at=2)
    # A Ctrl-C ends the command, once all is saved.
    ending = pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext()
    with logged() as output, ending:
        run_training(workdir, target, sections, log)
    after = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    return [step["iteration"] for step in log.steps], output.getvalue(), before == after


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize(
    ("world_size", "parallel", "number", "receiver", "asynchronous"),
    [
        pytest.param(1, layout(), signal.SIGTERM, 0, True, id="alone"),
        pytest.param(2, layout(tp=2), signal.SIGTERM, 1, False, id="tp2"),
        pytest.param(2, layout(pp=2), signal.SIGUSR1, 0, True, id="pp2"),
        # As with Ctrl-C, below
        pytest.param(2, layout(), signal.SIGUSR1, 1, False, id="dp2", marks=pytest.mark.slow),
        pytest.param(1, layout(), signal.SIGINT, 0, True, id="ctrl-c alone"),
        pytest.param(2, layout(), signal.SIGINT, 1, False, id="ctrl-c dp2"),
    ],
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(  # type: ignore[no-untyped-def]
    ranks, target, tmp_path, world_size, parallel, number, receiver, asynchronous
) -> None:
    sections = {"parallel": parallel, "training": {"train_iters": 4, "async_save": asynchronous}}
    results = ranks(world_size, run_and_signal, tmp_path, target, sections, number, receiver)
    assert all(iterations == [1, 2] and restored for iterations, _, restored in results)
    (message,) = [output for _, output, _ in results if output]
    assert f"stopped after iteration 2 of 4 ({signal.Signals(number).name} was received)" in message
    assert (tmp_path / "training/checkpoints" / LATEST).read_text() == "2\n"
    rest = one_report(ranks(world_size, run_training, tmp_path, target, sections))
    whole = one_report(ranks(world_size, run_training, tmp_path / "whole", target, sections))
    assert rest["steps"] == whole["steps"][2:]


@pytest.mark.parametrize("waits", [True, False])
def test_a_second_ctrl_c_after_a_while_does_not_wait_for_the_step(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    from megatron_fuse.training import interruption

    monkeypatch.setattr(interruption, "_AGAIN", 1e6 if waits else 0.0)
    before, seen = signal.signal(signal.SIGINT, lambda number, _: seen.append(number)), []
    try:
        with interruption.Interruption(device=torch.device("cpu"), data_check=None):
            os.kill(os.getpid(), signal.SIGTERM)  # a first one, whichever
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []
            os.kill(os.getpid(), signal.SIGINT)
            assert seen == ([] if waits else [signal.SIGINT])
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("ignored", [True, False])
def test_a_signal_that_is_ignored_stays_ignored(number: signal.Signals, ignored: bool) -> None:
    from megatron_fuse.training import interruption

    before = signal.signal(number, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        with interruption.Interruption(device=torch.device("cpu"), data_check=None) as stop:
            os.kill(os.getpid(), number)
            assert stop._received == (0 if ignored else number)
            assert (signal.getsignal(number) == signal.SIG_IGN) == ignored
        assert signal.getsignal(number) == (signal.SIG_IGN if ignored else signal.default_int_handler)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("option", "stops"),
    [
        ({"exit_interval": 3}, [3, 4]),
        ({"exit_duration_in_mins": 1e-6}, [1, 2]),
        ({"exit_duration_in_mins": 1e6}, [4]),
    ],
)
def test_a_run_stops_after_an_interval_or_a_time(ranks, target, tmp_path, option, stops) -> None:  # type: ignore[no-untyped-def]
    for stop in stops:
        ranks(1, run_training, tmp_path, target, {"training": {"train_iters": 4, **option}})
        assert (tmp_path / "training/checkpoints" / LATEST).read_text() == f"{stop}\n"


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
if __name__ == "__main__":
    from test_layouts import layout
    from watched_trainings import LineByLine, run_training
    import os
    work = Path({work!r})
    log = LineByLine(work / "losses.jsonl", os.environ["RANK"] == "0")
    steps = {{"train_iters": int(sys.argv[1])}}
    run_training(work, Path({target!r}), {{"parallel": layout(tp=2), "training": steps}}, log)
    (work / ("ended-" + os.environ["RANK"])).write_text(str(log.steps[-1]["iteration"]))
"""


def steps(losses: Path) -> list[int]:
    """Iterations of the steps, without those of evaluations."""
    records = [json.loads(line) for line in losses.read_text().splitlines()]
    return [record["iteration"] for record in records if "validation" not in record]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_ranks(target: Path, tmp_path: Path) -> None:
    """torchrun signals the whole process group of every rank, the writers' processes among them."""
    script, losses = tmp_path / "script.py", tmp_path / "losses.jsonl"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(SCRIPT.format(paths=paths, work=str(tmp_path), target=str(target)))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen([*launcher, "20"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 300
        # After the first phase's end at 7 and its checkpoint: the process that collects for the writers is
        # there by then.
        while not losses.exists() or len(losses.read_text().splitlines()) < 8:
            assert time.monotonic() < until and torchrun.poll() is None
            time.sleep(0.01)
        torchrun.send_signal(signal.SIGTERM)
        output, _ = torchrun.communicate(timeout=60)
    finally:
        torchrun.kill()
    assert torchrun.returncode != 0  # torchrun's own
    stopped = int((tmp_path / "training/checkpoints" / LATEST).read_text())
    assert f"stopped after iteration {stopped} of 20 (SIGTERM was received)" in output
    assert [(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)] == [str(stopped)] * 2
    subprocess.run([*launcher, "20"], env=environment, check=True, timeout=120)
    assert steps(losses) == [*range(1, 21)]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_ctrl_c_ends_a_training_with_one_line_and_the_same_command_goes_on(
    target: Path, tmp_path: Path, asynchronous: bool
) -> None:
    """As a terminal sends it, to torchrun and all ranks; the checkpoint's writers are in their group too."""
    script, losses = tmp_path / "script.py", tmp_path / "losses.jsonl"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    text = SCRIPT.format(paths=paths, work=str(tmp_path), target=str(target))
    text = text.replace('"training": {', f'"training": {{"save_interval": 2, "async_save": {asynchronous}, ')
    before, begin, rest = text.partition('if __name__ == "__main__":\n')
    main = (
        "import megatron_fuse.start\ndef main():\n"
        + rest
        + begin
        + "    from megatron_fuse.errors import exit_code\n    sys.exit(exit_code(main))\n"
    )
    script.write_text(before + main)
    launcher = [
        sys.executable,
        "-m",
        "megatron_fuse.torchrun",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        "20",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(
        launcher,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        until = time.monotonic() + 300
        while not losses.exists() or len(losses.read_text().splitlines()) < 8:
            assert time.monotonic() < until and torchrun.poll() is None, torchrun.stderr.read()
            time.sleep(0.01)
        os.killpg(torchrun.pid, signal.SIGINT)
        _, error = torchrun.communicate(timeout=120)
    finally:
        torchrun.kill()
    assert torchrun.returncode == 130
    assert error.endswith("interrupted: finished work is kept. Run the same command again to continue.\n")
    assert "Traceback" not in error and error.count("interrupted") == 1, error
    assert int((tmp_path / "training/checkpoints" / LATEST).read_text()) == steps(losses)[-1]
    subprocess.run(launcher, env=environment, check=True, timeout=300)
    assert steps(losses) == [*range(1, 21)]  # each once: the last one before the Ctrl-C is saved
