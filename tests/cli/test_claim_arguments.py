"""--claim and --no-wait on the command line."""

import argparse
import os
import sys
from pathlib import Path

import pytest

from megatron_fuse.claiming import DEFAULT_LEASE, LEASE, NO_WAIT, Claiming, claiming
from megatron_fuse.cli import main as command_line
from megatron_fuse.cli.claim_arguments import add_claim_arguments, take_claims
from megatron_fuse.errors import UserError

RECIPE = str(Path(__file__).resolve().parents[2] / "examples/profuser_7b.yaml")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without claims, and what it sets is undone."""
    for name in (LEASE, NO_WAIT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_claim_arguments(parser, may_leave=True)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], None),
        (["--claim"], Claiming(DEFAULT_LEASE)),
        (["--claim", "600"], Claiming(600)),
        (["--claim", "--no-wait"], Claiming(DEFAULT_LEASE, waits=False)),
    ],
)
def test_the_process_takes_claims_as_the_options_say(words: list[str], wanted: Claiming | None) -> None:
    assert take_claims(parsed(*words)) == (wanted is not None)
    assert claiming() == wanted


def test_a_command_that_another_has_started_takes_claims_as_that_one() -> None:
    take_claims(parsed("--claim", "600"))
    assert take_claims(parsed()) and claiming() == Claiming(600)


@pytest.mark.parametrize("seconds", ["0", "-5", "0.5", "inf", "nan"])
def test_a_time_that_is_none_is_refused(seconds: str) -> None:
    with pytest.raises(UserError, match=r"^--claim .*: the number of seconds must be at least 1\.$"):
        take_claims(parsed(f"--claim={seconds}"))
    assert LEASE not in os.environ


def test_leaving_needs_claims() -> None:
    with pytest.raises(UserError, match="--no-wait: without --claim"):
        take_claims(parsed("--no-wait"))


@pytest.mark.parametrize(
    ("words", "until"),
    [([], "fusion data"), (["--until", "scores"], "scores"), (["--until", "training"], None)],
)
def test_a_run_by_claim_ends_before_the_training(
    monkeypatch: pytest.MonkeyPatch, words: list[str], until: str | None
) -> None:
    from megatron_fuse.pipeline import start

    ran: list[object] = []
    monkeypatch.setattr(start, "check_files", lambda recipe: None)
    monkeypatch.setattr(start, "run_recipe", lambda *arguments: ran.extend(arguments))
    words = ["run", "--recipe", RECIPE, "--tensor-model-parallel-size", "1", "--claim", *words]
    monkeypatch.setattr(sys, "argv", ["megatron-fuse", *words])
    if until is None:
        with pytest.raises(UserError, match=r"the training has one owner\. With --claim, choose"):
            command_line.main()
        return
    command_line.main()
    assert ran[1:] == [1, until] and claiming() == Claiming()
