"""`megatron-fuse`: every command is found, described, completed and refused without the large libraries."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_fuse.cli import main as command_line
from megatron_fuse.cli import run as run_command
from megatron_fuse.cli.main import COMMANDS, make_parser
from megatron_fuse.pipeline import STAGES

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "examples/profuser_7b.yaml")
LARGE = {"torch", "transformers", "megatron", "matplotlib"}

# Runs commands one after another in one process, and says on stderr which of the large libraries they have
# imported.
SEVERAL = """
import runpy, sys
for module, *words in {lines!r}:
    sys.argv = ["program", *words]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (module, words, end.code)
print("imported:", *sorted({large!r} & sys.modules.keys()), file=sys.stderr)
"""


def test_descriptions_and_recipes_come_without_large_libraries() -> None:
    lines = [("megatron_fuse.cli", name, "--help") for name in COMMANDS]
    lines += [("megatron_fuse.cli", "--help"), ("megatron_fuse.cli", "--print-completion", "bash")]
    lines += [
        ("megatron_fuse.pretrain", "--help"),
        ("megatron_fuse.pretrain", "--recipe", RECIPE, "--print-recipe"),
    ]
    lines += [
        ("megatron_fuse.cli", name, "--recipe", RECIPE, "--print-recipe")
        for name in ("plan", "run", "capture")
    ]
    words = [sys.executable, "-W", "ignore", "-c", SEVERAL.format(lines=lines, large=LARGE)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "imported:\n"
    assert done.stdout.count("usage:") == len(COMMANDS) + 2 and done.stdout.count("preset: profuser") == 4


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["megatron-fuse", *words])
    return command_line.main()


def described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> str:
    """What --help prints after the usage, whose first line has the program's name."""
    with pytest.raises(SystemExit):
        run(monkeypatch, *words, "--help")
    return capsys.readouterr().out.partition("\n\n")[2]


def scripts() -> dict[str, list[str]]:
    """Commands of every script in tools/, by the table of docs/install.md."""
    rows = re.findall(
        r"^\| `python (tools/\w+\.py)`.*?\| (.*) \|$", (ROOT / "docs/install.md").read_text(), re.M
    )
    return {script: re.findall(r"`megatron-fuse ([\w-]+)`", commands) for script, commands in rows}


def test_the_table_has_every_script_and_every_command() -> None:
    assert set(scripts()) == {str(path.relative_to(ROOT)) for path in ROOT.glob("tools/*.py")}
    assert sorted(name for names in scripts().values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize("script", scripts())
def test_a_script_is_its_command(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wanted = described(monkeypatch, capsys, scripts()[script][0])
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert capsys.readouterr().out.partition("\n\n")[2] == wanted


def test_a_plan_is_a_run_that_only_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Namespace] = []
    monkeypatch.setattr(run_command, "run", received.append)
    options = ["--recipe", "R.yaml", "--nproc-per-node", "3", "--lr", "1", "--no-packing"]
    run(monkeypatch, "plan", *options)
    run(monkeypatch, "run", "--plan", *options)
    plan, same = map(vars, received)
    assert plan | {"command": "run"} == same and plan["plan"] and plan["nproc_per_node"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["captures"], "argument COMMAND: invalid choice: 'captures'"),
        (["capture"], "megatron-fuse capture: error: the following arguments are required: --recipe"),
        (["capture", "--recipe", "R", "--sources", "a"], "unrecognized arguments: --sources a"),
        (["--print-completion", "fish"], "invalid choice: 'fish'"),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.recorded_as)
def test_the_command_that_an_error_names_can_be_typed(stage) -> None:
    program, *words = shlex.split(stage.command.replace("{} --mode {}", "a --mode training").format("a", "b"))
    if program == "python":
        assert words == stage.module == ["-m", "megatron_fuse.pretrain"]
        return
    assert program == "megatron-fuse" and stage.module == ["-m", "megatron_fuse.cli", words[0]]
    arguments = make_parser(words[:1]).parse_args([*words, "--recipe", "R.yaml"])
    assert arguments.command == words[0]


def test_the_library_names_commands_that_exist() -> None:
    named, left = set(), []
    for path in (ROOT / "megatron_fuse").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"megatron-fuse ([a-z][a-z-]*)", text)) | set(
            re.findall(r"-m megatron_fuse\.cli ([a-z]+)", text)
        )
        left += [f"{path}: {found}" for found in re.findall(r"tools/\w+\.py|pretrain_fuse\.py", text)]
    assert named <= COMMANDS.keys() and len(named) > 10
    # A list of files of the repository.
    assert all("_ABOUT_RUNS" in Path(found.partition(":")[0]).read_text() for found in left)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["expe"], "experiments"),
        (["capture", "--capture-top"], "--capture-top-k --capture-top-p"),
        (["capture", "--mode", "tr"], "training"),
        (["run", "--recipe", "pypro"], "pyproject.toml"),
    ],
)
def test_bash_completes(
    words: list[str], found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--print-completion", "bash")
    assert not end.value.code
    line = ["megatron-fuse", *words]
    script = (
        capsys.readouterr().out
        + f"COMP_WORDS=({shlex.join(line)}); COMP_CWORD={len(line) - 1}\n"
        + 'function=$(complete -p megatron-fuse | sed "s/.*-F \\([^ ]*\\).*/\\1/")\n'
        + f'$function megatron-fuse "{line[-1]}" "{line[-2]}"; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-s"], input=script, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == found, done.stderr


def test_zsh_gets_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--print-completion", "zsh")
    script = capsys.readouterr().out
    assert not end.value.code and script.startswith("#compdef megatron-fuse")
    assert all(re.search(rf"^ +{name}:'", script, re.M) for name in COMMANDS)
