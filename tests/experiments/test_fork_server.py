"""Scripts as forks: what they see, how they end, what is left of them."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.fork_server import Commands


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    monkeypatch.setattr("megatron_fuse.experiments.fork_server.LIBRARIES", ("fractions",))
    with Commands(tmp_path, {**os.environ, "GREETING": "hello"}) as found:
        yield found


def script(directory: Path, text: str) -> list[str]:
    path = directory / "scripts/script.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return [sys.executable, str(path), "--flag", "a b"]


SEES = """
import beside, os, sys
given = sys.argv[1:], beside.VALUE, os.environ["GREETING"], os.getcwd()
print(__name__, *given, "fractions" in sys.modules, sys.stdin.read() == "")
print("to stderr", file=sys.stderr)
beside.VALUE += 1
"""


def test_a_script_finds_what_python_would_give_it_and_leaves_nothing(
    commands: Commands, tmp_path: Path
) -> None:
    words, log = script(tmp_path, SEES), tmp_path / "log.txt"
    (tmp_path / "scripts/beside.py").write_text("VALUE = 1\n")
    assert [commands.run(words, log) for _ in range(2)] == [0, 0]
    told = f"__main__ ['--flag', 'a b'] 1 hello {tmp_path} True True"
    assert sorted(log.read_text().splitlines()) == sorted([told, "to stderr"] * 2)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no such file')", 1, "no such file\n"),
        ("raise ValueError('odd')", 1, "ValueError: odd\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_how_a_script_ends_is_told_and_the_next_one_runs(
    commands: Commands, tmp_path: Path, text: str, code: int, said: str
) -> None:
    log = tmp_path / "log.txt"
    assert commands.run(script(tmp_path, text), log) == code
    assert log.read_text().endswith(said)
    assert commands.run(script(tmp_path, "print('next')"), log) == 0 and log.read_text().endswith("next\n")


def test_a_module_is_forked_as_a_script_is(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "parcel").mkdir()
    (tmp_path / "parcel/__main__.py").write_text(
        "import os, sys; print(__name__, sys.argv, 'fractions' in sys.modules)"
    )
    log = tmp_path / "log.txt"
    assert commands.run([sys.executable, "-m", "parcel", "--flag", "a b"], log) == 0
    assert log.read_text() == f"__main__ {[str(tmp_path / 'parcel/__main__.py'), '--flag', 'a b']} True\n"
    assert commands.run([sys.executable, "-m", "no_such_module"], log) == 1
    assert log.read_text().endswith("ImportError: No module named no_such_module\n")


def test_other_commands_are_started_as_they_are(commands: Commands, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert commands.run(["sh", "-c", "echo $GREETING; exit 4"], log) == 4
    assert commands.run([sys.executable, "-c", "import sys; print('fractions' in sys.modules)"], log) == 0
    assert log.read_text() == "hello\nFalse\n"


def test_a_lost_parent_is_told_and_replaced(commands: Commands, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    ends_its_parent = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    with pytest.raises(
        UserError,
        match="script.py could not be started: the process that starts it ended with exit code "
        f"-{signal.SIGKILL.value}",
    ):
        commands.run(script(tmp_path, ends_its_parent), log)
    assert commands.run(script(tmp_path, "print('next')"), log) == 0
