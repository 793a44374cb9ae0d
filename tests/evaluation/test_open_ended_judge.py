"""A judge behind a server: both orders, strict verdicts, and replies that are requested once."""

import json
import re
from pathlib import Path

import pytest
from local_server import Act, Asked, completion, scripted
from small_models import write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.open_ended import (
    Judges,
    evaluate_open_ended,
    participants_named,
    read_prompts,
)
from megatron_fuse.evaluation.open_ended.answers import given_answers
from megatron_fuse.evaluation.open_ended.judgements import PairwiseComparison
from megatron_fuse.evaluation.open_ended.results import OpenEndedResults
from megatron_fuse.evaluation.open_ended.server_judge import preference_of, request_body, verdict_of
from megatron_fuse.recipe import ServerOptions
from megatron_fuse.sources.completions import Reply

pytest.importorskip("openai", reason="openai is not installed: pip install 'megatron-fuse[server]'")

# `long` has the longer answers. But its answer to prompt 1 is that of `short`, and its answer to prompt 3 is
# empty.
ROWS = [
    {
        "id": n,
        "category": "even" if n % 2 == 0 else "odd",
        "instruction": f"Question {n}?",
        "reference": "forty-two" if n == 2 else None,
        "responses": {"short": f"a{n}", "long": "a1" if n == 1 else "" if n == 3 else f"a{n} and more"},
        "turn2": {"instruction": f"Then {n}?", "responses": {"short": f"b{n}", "long": f"b{n} and more"}},
    }
    for n in range(5)
]


def evaluate(output: Path, url: str, **options: object) -> OpenEndedResults:
    prompts = read_prompts(write_rows(output.with_suffix(".jsonl"), ROWS))
    server = ServerOptions(url=url, model="small", timeout=10, max_retries=1, **options)
    participants = participants_named(["short", "long"], prompts, None, "bf16")
    return evaluate_open_ended(participants, prompts, output, Judges(server=server))


def shown(asked: Asked) -> dict[str, str]:
    """The texts under the letters in a request."""
    return {
        letter: re.search(rf"begin of assistant {letter} >>>\n(.*?)\n<<<", asked.question, re.S)[1]
        for letter in "AB"
    }


def by_length(asked: Asked) -> Act:
    texts = shown(asked)
    return completion(f"Reasons. [[{'A' if len(texts['A']) > len(texts['B']) else 'B'}]]")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Because. [[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]] It is a tie: [[C]].", "C"),
        ("[[A]] or [[B]]", None),
        ("[A]", None),
        ("[[D]]", None),
        ("[[a]]", None),
        ("A is better", None),
        ("", None),
        ("<think>perhaps [[A]]</think>So [[B]]", "B"),
        ("<think>perhaps [[A]]", None),
    ],
)
def test_a_verdict_is_read_strictly(text: str, wanted: str | None) -> None:
    assert verdict_of(Reply(text, truncated="</think>" not in text and "<think>" in text)) == wanted
    assert verdict_of(Reply(text, refused=True)) is None and verdict_of(Reply(text, fault="500")) is None


@pytest.mark.parametrize("first", ["A", "B", "C", None])
@pytest.mark.parametrize("second", ["A", "B", "C", None])
def test_a_win_needs_both_orders(first: str | None, second: str | None) -> None:
    """In the second order the letters are exchanged."""
    preference = preference_of({"AB": first, "BA": second})
    if None in (first, second):
        assert preference is None
    else:
        winners = {first, {"A": "B", "B": "A", "C": "C"}[second]}
        assert preference == {frozenset("A"): 1, frozenset("B"): 0}.get(frozenset(winners), 0.5)


def test_each_order_shows_the_answers_under_other_letters(tmp_path: Path) -> None:
    with scripted(by_length) as server:
        results = evaluate(tmp_path / "out", server.url)
    (pair,) = results.judges[0].pairs
    # Of ten comparisons one has equal texts and one an empty answer; these two are not sent.
    assert len(server.asked) == 16
    assert (pair.model, pair.overall.wins, pair.overall.ties, pair.overall.losses) == ("long", 8, 1, 1)
    assert {turn: tally.wins for turn, tally in pair.turns.items()} == {1: 3, 2: 5}
    assert pair.categories["even"].wins == 6 and pair.categories["odd"].wins == 2
    assert results.judges[0].disagreements == 0
    by_question = {}
    for asked in server.asked:
        assert asked.body["temperature"] == 0 and asked.body["model"] == "small"
        texts = shown(asked)
        by_question.setdefault(frozenset(texts.values()), []).append(texts["A"])
    assert all(len(set(found)) == 2 for found in by_question.values()) and len(by_question) == 8


def test_a_request_holds_the_reference_and_the_conversation(tmp_path: Path) -> None:
    prompts = read_prompts(write_rows(tmp_path / "p.jsonl", ROWS))
    answers = {name: given_answers(name, prompts) for name in ("short", "long")}
    first = request_body("m", PairwiseComparison(prompts[2], 1, "long", "short"), "BA", answers)["messages"][
        1
    ]["content"]
    assert "Question 2?" in first and "forty-two" in first and "Then 2?" not in first
    assert first.index("a2\n") < first.index("a2 and more")
    second = request_body("m", PairwiseComparison(prompts[2], 2, "long", "short"), "AB", answers)["messages"][
        1
    ]["content"]
    assert "forty-two" not in second  # the reference is for the first turn
    order = [second.index(text) for text in ("Question 2?", "a2 and more", "Then 2?", "b2 and more", "b2\n")]
    assert order == sorted(order) and second.count("Then 2?") == 2


def test_a_judge_with_a_favourite_position_makes_ties_that_are_reported(tmp_path: Path) -> None:
    with scripted(lambda _: completion("[[A]]")) as server:
        results = evaluate(tmp_path / "out", server.url)
    (pair,) = results.judges[0].pairs
    assert (pair.overall.wins, pair.overall.ties, pair.overall.losses) == (0, 9, 1)
    assert results.judges[0].disagreements == 8
    assert "in 8 of 10 comparisons the verdict changed with the order" in " ".join(results.notes)


def test_a_reply_without_a_verdict_is_no_tie(tmp_path: Path) -> None:
    def script(asked: Asked) -> Act:
        silent = "Question 0?" in asked.question and shown(asked)["A"].startswith("a0 and")
        return completion("I cannot say.") if silent else by_length(asked)

    with scripted(script) as server:
        results = evaluate(tmp_path / "out", server.url)
    tally = results.judges[0].pairs[0].overall
    assert (tally.wins, tally.ties, tally.losses, tally.no_verdict) == (7, 1, 1, 1)
    assert tally.win_rate.value == 7.5 / 9
    assert "1 of 10 comparisons have no verdict" in " ".join(results.notes)
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    (undecided,) = [row for row in rows if row["preference"] is None]
    assert undecided["prompt"] == "0" and undecided["verdicts"] == {"AB": None, "BA": "B"}
    settings = json.loads((tmp_path / "out" / "open_ended.json").read_text())["judges"][0]["settings"]
    assert "[[C]]" in settings["texts"]["instructions"] and settings["model"] == "small"


def test_replies_are_requested_once_and_refused_requests_again(tmp_path: Path) -> None:
    refusing = True

    def script(asked: Asked) -> Act:
        if refusing and "Question 4?" in asked.question:
            return Act({"error": {"message": "too long"}}, status=400)
        return by_length(asked) if "Question" in asked.question else completion("Hello.")

    with scripted(script) as server:
        first = evaluate(tmp_path / "out", server.url)
        # Both turns of prompt 4 hold its question, so that two comparisons have no verdict.
        assert first.judges[0].pairs[0].overall.no_verdict == 2
        assert "too long" in (tmp_path / "out" / "judgements.jsonl").read_text()
        refusing, before = False, len(server.asked)
        second = evaluate(tmp_path / "out", server.url)
        assert len(server.asked) == before + 4
        assert second.judges[0].pairs[0].overall.no_verdict == 0
        evaluate(tmp_path / "out", server.url)
        assert len(server.asked) == before + 4
    # A finished evaluation needs no server.
    third = evaluate(tmp_path / "out", server.url)
    assert third.judges[0].pairs == second.judges[0].pairs


def test_a_judge_that_is_away_is_named(tmp_path: Path) -> None:
    with scripted(by_length) as server:
        pass
    with pytest.raises(UserError, match=r"judge: http.*cannot be reached.*fix judge.url"):
        evaluate(tmp_path / "out", server.url)
