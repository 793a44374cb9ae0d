"""Long work speaks within a shard: rate and time left, at most every half minute, and never the same line twice."""

import re
import time
from pathlib import Path

import pytest
from local_server import Act, Asked, completion, scripted
from small_models import save_model, small_recipe, write_rows
from test_server import recipe_for

import megatron_fuse.progress
from megatron_fuse.capture import capture
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.progress import INTERVAL, Progress, readable_rate, readable_seconds
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring.scores import score_responses
from megatron_fuse.stages import Context


class Clock:
    """Seconds that pass as the test says, or so many at every look."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 1000.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_lines_come_at_their_interval_with_rate_and_rest() -> None:
    clock, said = Clock(), []
    lines = Progress("work", "tokens", said.append, most=True, clock=clock)
    lines.begin("shard 3")
    for second in range(1, 121):
        clock.now = 1000.0 + second
        lines.update(2 * second, 240 - 2 * second, f"{second}/120 answers")
    assert said == [
        "work: shard 3: 30/120 answers, 2.0 tokens/s, at most 90 s left",
        "work: shard 3: 60/120 answers, 2.0 tokens/s, at most 60 s left",
        "work: shard 3: 90/120 answers, 2.0 tokens/s, at most 30 s left",
        "work: shard 3: 120/120 answers, 2.0 tokens/s, at most < 1 s left",
    ]


def test_a_standstill_is_said_and_no_line_is_said_twice() -> None:
    clock, said = Clock(), []
    lines = Progress("work", "answers", said.append, clock=clock)
    for second in range(1, 301):
        clock.now = 1000.0 + second
        lines.update(8 if second > 45 else 0, 6, "8/14 answers" if second > 45 else "0/14 answers")
    assert said[0] == "work: 0/14 answers, nothing new for 30 s"
    assert said[1] == "work: 8/14 answers, 8.0 answers/min, 45 s left"
    assert said[2] == "work: 8/14 answers, nothing new for 44 s"
    assert len(said) == len(set(said)) == 10


def test_a_part_begins_at_nothing() -> None:
    clock, said = Clock(), []
    lines = Progress("work", "tokens", said.append, clock=clock)
    clock.now += 1000
    lines.update(500, 500, "half")
    lines.begin("second")
    clock.now += INTERVAL - 1
    lines.update(29, 29, "half")
    assert len(said) == 1
    clock.now += 1
    lines.update(30, 60, "a third")
    assert said[1:] == ["work: second: a third, 1.0 tokens/s, 60 s left"]


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (12345.6, "12,346 x/s"),
        (1.0, "1.0 x/s"),
        (0.5, "30.0 x/min"),
        (1 / 60, "1.0 x/min"),
        (1 / 600, "6.0 x/h"),
        (1e-5, "0.0 x/h"),
    ],
)
def test_a_slow_rate_is_said_by_a_longer_period(per_second: float, text: str) -> None:
    assert readable_rate(per_second, "x") == text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "< 1 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h")])
def test_readable_seconds(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    directory = tmp_path_factory.mktemp("slow")
    rows = [{"instruction": f"Add {i} and {i + 1}.", "output": f"That makes {2 * i + 1}."} for i in range(10)]
    recipe = small_recipe(
        directory / "work",
        write_rows(directory / "data.jsonl", rows),
        save_model(directory / "alpha", "llama"),
        {"alpha": directory / "alpha", "beta": save_model(directory / "beta", "gpt_neox")},
        reward_models={
            "reward": {"model": str(save_model(directory / "reward", "llama", reward=True)), "dtype": "fp32"}
        },
        schedule={"preset": "profuser"},
        responses={"max_new_tokens": 8, "batch_tokens": 150},  # a batch of several examples, several batches of a shard
        scoring={"batch_tokens": 150},
        capture={"batch_tokens": 150},
    )
    prepare_instructions(Context(recipe))
    return recipe


def test_answers_captures_and_scores_speak_within_a_shard(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is half an interval later: every other batch, or token, is a line."""
    slow = Clock(INTERVAL / 2)
    monkeypatch.setattr(megatron_fuse.progress.Progress.__init__, "__kwdefaults__", {"most": False, "clock": slow})

    def lines(said: list[str], form: str) -> list[str]:
        """Those before the shard is there, which all have the form."""
        first = next(number for number, line in enumerate(said) if line.endswith("shard 1/1"))
        assert first >= 2 and len(set(said[:first])) == first
        assert all(re.fullmatch(form, line) for line in said[:first]), said
        return said[:first]

    for name in recipe.sources:
        said: list[str] = []
        generate_responses(Context(recipe), name, progress=said.append)
        directory = recipe.workdir / "responses" / name
        found = lines(
            said, rf"{directory}: shard 0: \d+/10 answers, \d+ tokens, [\d.]+ tokens/(s|min|h), at most \S+( \S+)* left"
        )
        counts = [int(line.split("/10 ")[0].rsplit(" ")[-1]) for line in found]
        assert counts == sorted(counts) and counts[-1] > 0
    for mode in ("inference", "training"):
        said = []
        capture(Context(recipe), "alpha", mode, progress=said.append)
        directory = recipe.workdir / "captures/alpha" / mode
        lines(said, rf"{directory}: shard 0: \d+/\d+ conversations, [\d.]+ tokens/(s|min|h), \S+( \S+)* left")
    said = []
    score_responses(Context(recipe), "reward", progress=said.append)
    lines(said, r"reward_models\.reward: shard 0: \d+/\d+ answers, [\d.]+ answers/(s|min|h), \S+( \S+)* left")


def test_a_server_that_takes_minutes_has_a_rate(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fuse.sources.server._PROGRESS_SECONDS", 0.01)
    slow = Clock(INTERVAL / 2)
    monkeypatch.setattr(megatron_fuse.progress.Progress.__init__, "__kwdefaults__", {"most": False, "clock": slow})
    said: list[str] = []

    def answer(asked: Asked) -> Act:
        before, deadline = len(said), time.monotonic() + 60
        while len(said) < before + 2 and time.monotonic() < deadline:  # one at least is about the answer before
            time.sleep(0.01)
        return completion("yes")

    with scripted(answer) as server:
        served = recipe_for(recipe.workdir.parent / "alpha", tmp_path, server.url, concurrency=1)
        generate_responses(Context(served), "served", progress=said.append)
    assert len(said) == len(set(said))
    rates = [line for line in said if "nothing new" not in line and line.endswith(" left")]
    assert len(rates) >= 7
    assert all(re.search(r": shard 0: [1-8]/8 answers, \d+\.\d answers/(min|h), ", line) for line in rates), rates
    assert not any(" 0.0 " in line for line in rates)
