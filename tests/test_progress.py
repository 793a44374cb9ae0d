"""Long work shows itself in the same words on a terminal, by a bar, and elsewhere, by a line a minute."""

import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from local_server import Act, Asked, completion, scripted
from log_lines import at_every_shard, logged
from served_recipes import recipe_for
from small_models import save_model, small_recipe, write_rows

import megatron_fuse.progress
from megatron_fuse.capture import capture
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.logs import LEVELS
from megatron_fuse.progress import INTERVAL, Progress, readable_rate, readable_seconds
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring.scores import score_responses
from megatron_fuse.stages import Context

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Seconds that pass as the test says, or so many at every look."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 1000.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_a_line_a_minute_and_one_at_the_end() -> None:
    clock = Clock()
    with logged() as text, Progress("work", "answers", 240, clock=clock) as progress:
        for second in range(1, 241):
            clock.now = 1000.0 + second
            progress.update(second, 2 * second)
    assert text.getvalue().splitlines() == [
        "work: 0%, 0/240 answers",
        "work: 25%, 60/240 answers, 2.0 tokens/s, 3 min left",
        "work: 50%, 120/240 answers, 2.0 tokens/s, 2 min left",
        "work: 75%, 180/240 answers, 2.0 tokens/s, 60 s left",
        "work: 100%, 240/240 answers, 2.0 tokens/s, < 1 s left",
        "work: made 240 answers, 480 tokens in 4 min, 2.0 tokens/s",
    ]


def test_a_standstill_is_shown() -> None:
    clock = Clock()
    with logged() as text, Progress("work", "answers", 14, clock=clock) as progress:
        for second in range(1, 301):
            clock.now = 1000.0 + second
            progress.update(8 if second > 90 else 0)
    assert text.getvalue().splitlines() == [
        "work: 0%, 0/14 answers",
        "work: 0%, 0/14 answers, nothing new for 60 s",
        "work: 57%, 8/14 answers, 4.0 answers/min, 90 s left",
        "work: 57%, 8/14 answers, nothing new for 89 s",
        "work: 57%, 8/14 answers, nothing new for 2 min",
        "work: 57%, 8/14 answers, nothing new for 3 min",
        "work: made 8 answers in 5 min, 1.6 answers/min; 6 are left",
    ]


def test_work_that_was_there_before_counts_as_done_and_not_as_fast() -> None:
    """The first 100 were there; a part of 50 is half done, and another process has made 30."""
    clock = Clock()
    with logged() as text, Progress("work", "examples", 200, already=100, most=True, clock=clock) as progress:
        progress.begin_part(50)
        clock.now += 60
        progress.update(10, 600, share=0.5)
        clock.now += 60
        progress.end_part(180)
        progress.begin_part(20)
        progress.found(5)
        progress.advance(15)
        progress.end_part(200)
    assert text.getvalue().splitlines() == [
        "work: 50%, 100/200 examples",
        "work: 62%, 110/200 examples, 10.0 tokens/s, at most 3 min left",
        "work: 90%, 180/200 examples, 5.0 tokens/s, at most 30 s left",
        "work: made 95 examples, 600 tokens in 2 min, 5.0 tokens/s; 105 were there already",
    ]


def test_work_that_ends_by_an_error_claims_nothing() -> None:
    with logged() as text, pytest.raises(ValueError), Progress("work", "examples", 2):
        raise ValueError
    assert text.getvalue() == "work: 0%, 0/2 examples\n"


@pytest.mark.parametrize("total", [0, 3])
def test_work_without_a_rest_is_complete(total: int) -> None:
    with logged() as text, Progress("work", "examples", total, already=total):
        pass
    assert text.getvalue().splitlines() == [
        f"work: 100%, {total}/{total} examples",
        f"work: already complete, {total} examples",
    ]


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "< 1 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h")]
)
def test_readable_seconds(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_shows_itself_and_those_above(level: str) -> None:
    logger = logging.getLogger("megatron_fuse.anything")
    with logged(level) as text:
        for each in LEVELS:
            logger.log(logging.getLevelNamesMapping()[each.upper()], "text")
        with Progress("work", "examples", 1) as progress:
            progress.update(1)
    lines = text.getvalue().splitlines()
    expected = {"debug": "debug: text", "info": "text", "warning": "warning: text", "error": "error: text"}
    shown = [expected[each] for each in LEVELS[LEVELS.index(level) :]]
    assert lines[: len(shown)] == shown
    assert bool(lines[len(shown) :]) == (level in ("debug", "info"))


@pytest.mark.parametrize(("rank", "prefix"), [("0", ""), ("3", "rank 3: ")])
def test_other_ranks_write_warnings_alone(rank: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    logger = logging.getLogger("megatron_fuse.anything")
    with logged() as text:
        logger.info("news")
        logger.warning("trouble")
        logger.error("worse")
    news = ["news"] if rank == "0" else []
    assert text.getvalue().splitlines() == [*news, f"{prefix}warning: trouble", f"{prefix}error: worse"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    directory = tmp_path_factory.mktemp("slow")
    rows = [{"instruction": f"Add {i} and {i + 1}.", "output": f"That makes {2 * i + 1}."} for i in range(10)]
    recipe = small_recipe(
        directory / "work",
        write_rows(directory / "data.jsonl", rows),
        save_model(directory / "alpha", "llama"),
        {"alpha": directory / "alpha", "beta": save_model(directory / "beta", "gpt_neox")},
        data={"shard_size": 5},
        reward_models={
            "reward": {"model": str(save_model(directory / "reward", "llama", reward=True)), "dtype": "fp32"}
        },
        schedule={"preset": "profuser"},
        # A batch of several examples, several batches of a shard.
        responses={"max_new_tokens": 8, "batch_tokens": 150},
        scoring={"batch_tokens": 150},
        capture={"batch_tokens": 150},
    )
    prepare_instructions(Context(recipe))
    return recipe


def test_answers_captures_and_scores_speak_within_a_shard(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at the clock is half an interval later: every other batch, or token, is a line."""
    slow = Clock(INTERVAL / 2)
    monkeypatch.setattr(
        megatron_fuse.progress.Progress.__init__, "__kwdefaults__", {**_DEFAULTS, "clock": slow}
    )

    def lines(make: Callable[[], object], what: object, total: int, unit: str, most: str) -> None:
        with logged() as text:
            make()
        first, *middle, last = text.getvalue().splitlines()
        assert first == f"{what}: 0%, 0/{total} {unit}"
        rate = rf"[\d.,]+ tokens/(s|min|h), {most}\S+( \S+)* left"
        assert len(middle) >= 2
        assert all(re.fullmatch(rf"{what}: \d+%, \d+/{total} {unit}, {rate}", line) for line in middle), (
            middle
        )
        done = [int(line.split(f"/{total} ")[0].rsplit(" ")[-1]) for line in middle]
        assert done == sorted(done) and done[-1] > 0
        made = rf"{what}: made {total} {unit}, [\d,]+ tokens in \d+(\.\d)? \w+, [\d.,]+ tokens/(s|min|h)"
        assert re.fullmatch(made, last), last
        with logged() as text:
            make()
        assert text.getvalue() == f"{what}: already complete, {total} {unit}\n"

    for name in recipe.sources:
        answers = recipe.workdir / "responses" / name
        lines(
            lambda name=name: generate_responses(Context(recipe), name), answers, 10, "examples", "at most "
        )  # type: ignore[misc]
    for mode in ("inference", "training"):
        captures = recipe.workdir / "captures/alpha" / mode
        lines(lambda mode=mode: capture(Context(recipe), "alpha", mode), captures, 10, "examples", "")  # type: ignore[misc]
    scores = r"reward_models.reward"
    lines(lambda: score_responses(Context(recipe), "reward"), scores, 20, "answers", "")


_DEFAULTS = dict(megatron_fuse.progress.Progress.__init__.__kwdefaults__ or {})


def test_a_stage_that_goes_on_says_what_was_there(recipe: Recipe) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    directory = recipe.workdir / "captures/beta/training"
    with logged() as text:
        with pytest.raises(KeyboardInterrupt), at_every_shard(interrupt):
            capture(Context(recipe), "beta", "training")
        first = text.getvalue().splitlines()
        capture(Context(recipe), "beta", "training")
    assert first == [f"{directory}: 0%, 0/10 examples"]
    begun, ended = text.getvalue().splitlines()[1:]
    assert begun == f"{directory}: 50%, 5/10 examples"
    assert ended.startswith(f"{directory}: made 5 examples, ") and ended.endswith("; 5 were there already")


def test_a_server_that_takes_minutes_has_a_rate(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fuse.sources.server._PROGRESS_SECONDS", 0.01)
    slow = Clock(INTERVAL / 2)
    monkeypatch.setattr(
        megatron_fuse.progress.Progress.__init__, "__kwdefaults__", {**_DEFAULTS, "clock": slow}
    )

    with logged() as text:

        def answer(asked: Asked) -> Act:
            before, deadline = text.getvalue().count("\n"), time.monotonic() + 60
            # One line at least is about the answer before.
            while text.getvalue().count("\n") < before + 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            return completion("yes")

        with scripted(answer) as server:
            served = recipe_for(recipe.workdir.parent / "alpha", tmp_path, server.url, concurrency=1)
            generate_responses(Context(served), "served")
    rates = [line for line in text.getvalue().splitlines() if line.endswith(" left")]
    assert len(rates) >= 7
    assert all(re.search(r": \d+%, [1-8]/8 examples, \d+\.\d examples/(min|h), ", line) for line in rates), (
        rates
    )
    assert not any(" 0.0 " in line for line in rates)


WORK = """
import logging
from megatron_fuse.errors import exit_code
from megatron_fuse.logs import start_logging
from megatron_fuse.progress import Progress

seconds = iter(range(0, 10**6, 30))

def main():
    start_logging()
    with Progress("some/\\x1b[2Jdirectory", "examples", 4, clock=lambda: next(seconds)) as progress:
        progress.update(1, 50)
        logging.getLogger("megatron_fuse.x").warning("beside the bar \\x1b[2J")
        progress.update(2, 100)
        progress.update(3, 150)
        progress.update(4, 200)
        END
    print("result")

raise SystemExit(exit_code(main))
"""
LINES = [
    r"some/\x1b[2Jdirectory: 0%, 0/4 examples",
    r"warning: beside the bar \x1b[2J",
    r"some/\x1b[2Jdirectory: 50%, 2/4 examples, 1.7 tokens/s, 60 s left",
    r"some/\x1b[2Jdirectory: 100%, 4/4 examples, 1.7 tokens/s, < 1 s left",
    r"some/\x1b[2Jdirectory: made 4 examples, 200 tokens in 2 min, 1.3 tokens/s",
]


def on_terminal(code: str, **environment: str) -> tuple[int, str]:
    """Exit code and screen output of a program whose standard error is a terminal of 200 columns."""
    leader, follower = pty.openpty()
    from fcntl import ioctl
    from struct import pack
    from termios import TIOCSWINSZ

    ioctl(follower, TIOCSWINSZ, pack("HHHH", 24, 200, 0, 0))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=follower,
        stdout=follower,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "TERM": "xterm", **environment},
        start_new_session=True,
    )
    os.close(follower)
    written = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            written += os.read(leader, 65536)
        except OSError:  # the program has ended
            break
    os.close(leader)
    return process.wait(60), written.decode()


def test_a_pipe_gets_the_words_line_by_line() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", WORK.replace("END", "pass")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stderr.splitlines() == LINES
    assert done.stderr.replace("\n", "").isprintable()
    assert done.returncode == 0 and done.stdout == "result\n"


def test_a_terminal_gets_a_bar_of_the_same_words() -> None:
    code, written = on_terminal(WORK.replace("END", "pass"))
    assert code == 0
    drawn = [each.strip() for each in re.split(r"[\r\n]", written)]
    bars = [re.fullmatch(r"\|(.{12})\| (.*)", each) for each in drawn]
    words = [bar[2] for bar in bars if bar]
    assert [line for line in dict.fromkeys(words) if line in LINES] == [LINES[0], LINES[2], LINES[3]]
    assert len(words) == len([each for each in drawn if "%" in each])  # a bar has a line of its own
    # The end, the warning and the result stand on lines of their own, and the bar is gone.
    assert [each for each in drawn if each.strip("| ") and each not in [bar[0] for bar in bars if bar]] == [
        LINES[1],
        LINES[4],
        "result",
    ]
    assert "\x1b[2J" not in written


def test_a_terminal_without_movement_gets_lines() -> None:
    code, written = on_terminal(WORK.replace("END", "pass"), TERM="dumb")
    assert code == 0 and written.splitlines() == [*LINES, "result"]


def test_other_ranks_draw_no_bar() -> None:
    code, written = on_terminal(WORK.replace("END", "pass"), RANK="1")
    assert code == 0 and written.splitlines() == ["rank 1: " + LINES[1], "result"]


def test_an_interrupt_removes_the_bar_and_ends_with_one_line() -> None:
    code, written = on_terminal(WORK.replace("END", "raise KeyboardInterrupt"))
    assert code == 130
    *_, blank, last = written.replace("\r\n", "\n").split("\r")
    assert blank.isspace()  # over the bar
    assert last.startswith("\ninterrupted: ") and last.count("\n") == 2  # one line, below ^C


def test_an_error_removes_the_bar_and_ends_with_one_line() -> None:
    raising = "from megatron_fuse.errors import UserError; raise UserError('file: broken')"
    code, written = on_terminal(WORK.replace("END", raising))
    assert code == 2 and written.replace("\r\n", "\n").split("\r")[-1] == "error: file: broken\n"
