"""No process outlives the one that started it, and a signal to a command that runs others ends all of them
in order.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_fuse.processes import run_tied, tied

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
SLEEPS = [sys.executable, "-c", "import time; print('sleeps', flush=True); time.sleep(600)"]

TIED = """
import subprocess
from megatron_fuse.processes import tied
subprocess.run(tied({SLEEPS}))
"""
POOL = """
import multiprocessing, sys, time
from concurrent.futures import ProcessPoolExecutor
from megatron_fuse.processes import end_with_pool

def work(number):
    print("sleeps", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1]), end_with_pool) as pool:
        list(pool.map(work, range(2)))
"""
INNER = f"from megatron_fuse.processes import run_tied\nrun_tied({SLEEPS})"
# A script as a fork, which runs a script of its own
COMMANDS = """
import os, sys
from pathlib import Path
from megatron_fuse.experiments import fork_server as commands
commands.LIBRARIES = ()
here = Path(__file__).parent
(here / "inner.py").write_text({INNER})
with commands.Commands(here, os.environ) as starter:
    starter.run([sys.executable, str(here / "inner.py")], Path(__file__).with_name("output.txt"))
"""
OTHER_COMMAND = """
import os
from pathlib import Path
from megatron_fuse.experiments.fork_server import Commands
with Commands(Path("/"), os.environ) as starter:
    starter.run({SLEEPS}, Path(__file__).with_name("output.txt"))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a Python script that leads a session, and waits until it, or what it has started, says that
    it sleeps.
    """
    started, output = list[subprocess.Popen](), tmp_path / "output.txt"

    def start(text: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen:
        path = tmp_path / "script.py"
        path.write_text(text.replace("{SLEEPS}", repr(SLEEPS)).replace("{INNER}", repr(INNER)))
        with output.open("a") as file:
            words = [sys.executable, str(path), *arguments]
            started.append(
                subprocess.Popen(words, start_new_session=True, stdout=file, env=os.environ | (env or {}))
            )
        while "sleeps\n" not in output.read_text():
            assert started[-1].poll() is None
            time.sleep(0.01)
        return started[-1]

    yield start
    for process in started:
        for left in in_session(process.pid):
            left.kill()
        process.kill()
        process.wait()


def in_session(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_all_end(session: int, *, within: float = 30) -> None:
    until = time.monotonic() + within
    while left := in_session(session):
        assert time.monotonic() < until, [process.cmdline() for process in left]
        time.sleep(0.02)


@linux
@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        pytest.param(TIED, [], id="tied"),
        pytest.param(POOL, ["spawn"], id="pool-spawned"),
        pytest.param(POOL, ["fork"], id="pool-forked"),
        pytest.param(COMMANDS, [], id="script-of-a-script"),
        pytest.param(OTHER_COMMAND, [], id="other-command"),
    ],
)
def test_what_a_killed_process_has_started_ends(start: Callable, text: str, arguments: list[str]) -> None:
    process = start(text, *arguments)
    assert len(in_session(process.pid)) > 1
    process.kill()
    assert_all_end(process.pid)


@linux
def test_a_command_whose_parent_has_ended_before_does_not_run(tmp_path: Path) -> None:
    words = tied([sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"])
    place = words.index(str(os.getpid()))
    other = [*words[:place], str(os.getppid()), *words[place + 1 :]]
    assert subprocess.run(other).returncode == -signal.SIGKILL
    assert not (tmp_path / "ran").exists()
    assert subprocess.run(words).returncode == 0 and (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -9 $$"], -9),
        (["no-such-program"], 127),
    ],
)
def test_how_a_tied_command_ends_is_its_exit_code(words: list[str], code: int) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert run_tied(words) == code
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


# Ends at the first SIGTERM in its own time; a second one would be recorded too.
TAKES_ITS_TIME = """
import signal, sys, time
seen = []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
print("sleeps", flush=True)
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
open(sys.argv[1], "w").write(",".join(map(str, seen)))
"""
RUNS_IT = """
import sys
from megatron_fuse.processes import run_tied
run_tied([sys.executable, "-c", {TAKES_ITS_TIME}, sys.argv[1]])
print("goes on", flush=True)
"""


@pytest.mark.parametrize(
    ("sent", "to_all", "arrive", "ends_with"),
    [
        pytest.param([signal.SIGTERM], False, [signal.SIGTERM], -signal.SIGTERM, id="term"),
        pytest.param([signal.SIGUSR1], False, [signal.SIGTERM], -signal.SIGUSR1, id="usr1"),
        # As `timeout` does it, to the process and then to its group: torchrun can take a second one, not a
        # third
        pytest.param([signal.SIGTERM, signal.SIGTERM], False, [signal.SIGTERM], -signal.SIGTERM, id="twice"),
        pytest.param([signal.SIGINT], True, [signal.SIGINT], -signal.SIGINT, id="ctrl-c"),
    ],
)
def test_a_signal_ends_the_command_and_then_this_process(
    start: Callable, tmp_path: Path, sent: list[int], to_all: bool, arrive: list[int], ends_with: int
) -> None:
    process = start(RUNS_IT.replace("{TAKES_ITS_TIME}", repr(TAKES_ITS_TIME)), str(tmp_path / "seen"))
    for number in sent:
        (os.killpg if to_all else os.kill)(process.pid, number)
        time.sleep(0.1)
    assert process.wait(timeout=60) == ends_with and "goes on" not in (tmp_path / "output.txt").read_text()
    assert (tmp_path / "seen").read_text() == ",".join(str(int(number)) for number in arrive)
    assert_all_end(process.pid)


RANK = """
import signal, sys, time
from megatron_fuse import processes
from megatron_fuse.errors import exit_code

def main():
    processes._PATIENCE = 0.5
    if sys.argv[1] == "saves":
        signal.signal(signal.SIGTERM, lambda number, frame: (open(sys.argv[2], "w").close(), sys.exit()))
    if sys.argv[1] == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("sleeps", flush=True)
    time.sleep(600)

exit_code(main)
"""
AGENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", {RANK}, *sys.argv[1:]])
"""


@pytest.mark.parametrize("rank", ["saves", "ends", "hangs"])
def test_a_rank_ends_after_torchrun(start: Callable, tmp_path: Path, rank: str) -> None:
    agent = start(
        AGENT.replace("{RANK}", repr(RANK)),
        rank,
        str(tmp_path / "saved"),
        env={"TORCHELASTIC_RUN_ID": "none"},
    )
    agent.kill()
    assert_all_end(agent.pid)
    assert (tmp_path / "saved").exists() == (rank == "saves")


def test_a_command_outside_torchrun_goes_on_without_its_shell(start: Callable, tmp_path: Path) -> None:
    shell = start(AGENT.replace("{RANK}", repr(RANK)), "ends", str(tmp_path / "saved"))
    shell.kill()
    time.sleep(2)
    assert len(in_session(shell.pid)) == 1
