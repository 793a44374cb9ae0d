"""Prompts are read in both forms, with answers or without; anything else is named with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.open_ended import participants_named, read_prompts, reward_models_of
from megatron_fuse.evaluation.open_ended.answers import Answer, conversation, given_answers, turns_of
from megatron_fuse.recipe import Recipe, RewardModelOptions, make_recipe

MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "reference": ["a", "b"]}
ALPACA = {"instruction": "Sort.", "input": "b a", "dataset": "koala", "output": "a b", "generator": "davinci"}
ANSWERED = {
    "id": "mt-1",
    "instruction": "First?",
    "responses": {"one": "1", "two": "2"},
    "turn2": {"instruction": "Second?", "responses": {"one": "11"}},
    "reference": None,
}


@pytest.mark.parametrize("as_list", [False, True])
def test_both_forms_are_read_from_lines_and_from_a_list(tmp_path: Path, as_list: bool) -> None:
    rows = [MT_BENCH, ALPACA, ANSWERED]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(rows, indent=1) if as_list else "\n".join(map(json.dumps, rows)))
    first, second, third = read_prompts(path)
    assert (first.id, first.category, list(first.turns)) == ("81", "writing", ["Write.", "Again."])
    assert list(first.references) == ["a", "b"] and not first.given
    assert (second.id, second.category, list(second.turns)) == ("2", "koala", ["Sort.\n\nb a"])
    assert (third.id, list(third.turns)) == ("mt-1", ["First?", "Second?"])
    assert third.given == {"one": ["1", "11"], "two": ["2"]}
    assert [prompt.id for prompt in read_prompts(path, limit=2)] == ["81", "2"]
    assert turns_of([first, second]) == [("81", 1), ("2", 1), ("81", 2)]


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [(None, [None, None]), ("a", ["a", None]), (["a"], ["a", None]), ([None, "b"], [None, "b"])],
)
def test_a_reference_belongs_to_a_turn(tmp_path: Path, reference: Any, wanted: list[str | None]) -> None:
    (prompt,) = read_prompts(write_rows(tmp_path / "p.jsonl", [MT_BENCH | {"reference": reference}]))
    assert list(prompt.references) == wanted


def test_answers_of_the_form_of_mt_bench_are_lists_by_turn(tmp_path: Path) -> None:
    row = MT_BENCH | {"responses": {"one": ["x", "y"], "two": "z"}}
    (prompt,) = read_prompts(write_rows(tmp_path / "p.jsonl", [row]))
    answers = given_answers("one", [prompt])
    assert [answer.text for answer in answers.values()] == ["x", "y"]
    assert list(given_answers("two", [prompt])) == [("81", 1)]
    assert conversation(prompt, 2, answers) == [
        {"role": "user", "content": "Write."},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "Again."},
    ]
    thinking = {("81", 1): Answer("81", 1, "x", reasoning="hm")}
    assert conversation(prompt, 2, thinking)[1]["reasoning_content"] == "hm"


def changed(row: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return row | keys


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, r":2: neither turns nor instruction is among the keys \(question\)"),
        (changed(MT_BENCH, turns=[]), r":2: turns: .*at least 1 item"),
        (changed(MT_BENCH, turns=["a", "  "]), ":2: turns.1: must not be blank"),
        (changed(MT_BENCH, turns="a"), ":2: turns: must be a valid list, not 'a'"),
        (changed(MT_BENCH, turns=["\ud800"]), ":2: turns.0: must not hold half of a surrogate pair"),
        (changed(MT_BENCH, reference=["a"] * 3), ":2: reference has 3 texts, but the prompt has 2 turns"),
        (changed(MT_BENCH, question_id=True), ":2: question_id: must be a valid string, not True"),
        (changed(MT_BENCH, category=3), ":2: category: must be a valid string, not 3"),
        (changed(MT_BENCH, responses={"m": ["a", "b", "c"]}), r":2: there are 3 answers of 'm'.* has 2"),
        (changed(ALPACA, instruction=None), ":2: instruction: must be a valid string, not None"),
        (changed(ALPACA, responses={"m": 3}), ":2: responses.m: must be a valid list, not 3"),
        (changed(ANSWERED, turn2={"instruction": "S?", "responses": {"three": "x"}}), "has 0 of its answers"),
        (changed(ANSWERED, turn2={"responses": {"one": "x"}}), "there are 2 answers of 'one'"),
        ("[1]", ":2: a row must be a JSON object"),
        ("{", ":2: not valid JSON"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"instruction": "fine"}, row])
    with pytest.raises(UserError, match=message):
        read_prompts(path)


def test_an_id_is_given_once_and_a_file_has_rows(tmp_path: Path) -> None:
    rows = [ALPACA | {"id": 7}, MT_BENCH, MT_BENCH | {"question_id": "7"}]
    with pytest.raises(UserError, match=r":3: the id '7' is that of row 1 too"):
        read_prompts(write_rows(tmp_path / "p.jsonl", rows))
    with pytest.raises(UserError, match="has no prompts"):
        read_prompts(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match=r"missing\.jsonl: the file is missing"):
        read_prompts(tmp_path / "missing.jsonl")


def recipe(**sections: Any) -> Recipe:
    server = {"url": "http://localhost:1/v1", "model": "m"}
    return make_recipe(
        {
            "workdir": "w",
            "target": {"model": "t"},
            "sources": {
                "local": {"model": "l", "chat_template": "chatml", "dtype": "fp32"},
                "served": {"model": "s", "server": server},
            },
            "data": {"path": "d"},
            "schedule": {"preset": "fuse"},
            **sections,
        }
    )


def test_a_name_alone_is_a_model_of_the_recipe_or_of_the_file(tmp_path: Path) -> None:
    prompts = read_prompts(write_rows(tmp_path / "p.jsonl", [ANSWERED]))
    named = participants_named(["local", "one"], prompts, recipe(), "bf16")
    assert [(each.name, each.where) for each in named] == [("local", "sources.local"), ("one", "one")]
    assert named[0].options == recipe().sources["local"] and named[1].options is None


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["one"], "name at least two models"),
        (["one", "one"], "the name 'one' is given twice"),
        (["one", "three"], "three: this is neither .* choose one of local, served, target, one, two"),
        (["one", "served"], r"sources.served.server: this model does not answer in this process"),
        (["one", "a/b=c"], "'a/b=c' is not of the form NAME=DIR"),
        (["one", "x=nowhere"], "x: nowhere has no config.json"),
    ],
)
def test_a_wrong_name_is_refused(tmp_path: Path, texts: list[str], message: str) -> None:
    prompts = read_prompts(write_rows(tmp_path / "p.jsonl", [ANSWERED]))
    with pytest.raises(UserError, match=message):
        participants_named(texts, prompts, recipe(), "bf16")


def test_a_name_of_both_is_refused(tmp_path: Path) -> None:
    row = ANSWERED | {"responses": {"local": "1", "one": "2"}}
    prompts = read_prompts(write_rows(tmp_path / "p.jsonl", [row]))
    with pytest.raises(UserError, match="local: this is both a model of the recipe and a model with answers"):
        participants_named(["local", "one"], prompts, recipe(), "bf16")


def test_the_reward_models_are_those_that_vote_in_the_recipe() -> None:
    voting = {"reward_models": {name: {"model": name} for name in "abc"}}
    voting["selection"] = {"reward_models": ["a", "c"], "strongest": "c"}
    found = reward_models_of(recipe(**voting), {})
    assert (list(found.options), found.strongest) == (["a", "c"], "c")
    named = {"x": RewardModelOptions(model="x"), "y": RewardModelOptions(model="y")}
    found = reward_models_of(recipe(**voting), named)
    assert (list(found.options), found.strongest) == (["x", "y"], "x")
    assert reward_models_of(recipe(), {}) is None and reward_models_of(None, {}) is None


def test_a_file_of_scores_is_no_judge() -> None:
    given = recipe(reward_models={"a": {"model": "a"}, "b": {"scores": "scores.jsonl"}})
    with pytest.raises(
        UserError, match=r"reward_models.b.scores: a file of scores has none of these answers"
    ):
        reward_models_of(given, {})
