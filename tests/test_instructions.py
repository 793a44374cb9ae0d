"""Laws of the instructions stage: what is read, what is refused, what a sample and a cut may depend on."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
from small_models import save_tokenizer, small_recipe, write_rows
from transformers import LlamaConfig

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import (
    load_examples,
    open_instructions,
    plan_instructions,
    prepare_instructions,
    read_rows,
)
from megatron_fuse.instructions.examples import Example
from megatron_fuse.instructions.prepare import fit
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target and two sources with vocabularies of other sizes; only tokenizer and config, which is all this stage reads."""
    root = tmp_path_factory.mktemp("models")
    for name, vocab_size in {"target": 300, "coarse": 340, "bytes": 260}.items():
        save_tokenizer(root / name, vocab_size)
        LlamaConfig(vocab_size=340, architectures=["LlamaForCausalLM"]).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def recipe_for(models: dict[str, Path], workdir: Path, rows: list[object], **sections: object) -> Recipe:
    data = write_rows(workdir / "data.jsonl", rows)
    sources = {name: models[name] for name in ("coarse", "bytes")}
    return small_recipe(workdir / "run", data, models["target"], sources, **sections)


def alpaca(number: int, **more: object) -> dict[str, object]:
    return {"id": f"e{number}", "instruction": f"Question {number}?", "output": f"Answer {number}.", **more}


FORMS = {
    "alpaca": {"instruction": "Q", "input": "I", "output": "A", "system": "S"},
    "orca": {"system_prompt": "S", "question": "Q\n\nI", "response": "A"},
    "messages": {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q\n\nI"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "nobody answers this"},
        ]
    },
    "sharegpt": {"system": "S", "conversations": [{"from": "human", "value": "Q\n\nI"}, {"from": "gpt", "value": "A"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_example(tmp_path: Path, form: str) -> None:
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [FORMS[form]]))
    (example,) = rows.examples
    assert (rows.form, rows.bad) == (form, [])
    assert (example.system, example.response) == ("S", "A")
    assert example.prompt() == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\n\nI"}]
    explicit = read_rows(write_rows(tmp_path / "rows.jsonl", [FORMS[form] | {"id": 7}]), form)
    assert explicit.examples[0].id == "7"


def test_several_turns_and_default_system(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    (example,) = read_rows(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])).examples
    assert (example.messages, example.response, example.system) == (turns[:3], "d", None)
    assert example.prompt("be brief") == [{"role": "system", "content": "be brief"}, *turns[:3]]
    assert example.prompt() == turns[:3]


BAD_ROWS = {
    "no response": ({"instruction": "Q"}, "output is missing"),
    "empty response": ({"instruction": "Q", "output": " \n"}, "response is empty"),
    "empty prompt": ({"instruction": " ", "output": "A"}, "prompt is empty"),
    "response of a wrong type": ({"instruction": "Q", "output": ["A"]}, "output is a list"),
    "prompt of a wrong type": ({"instruction": 5, "output": "A"}, "instruction is a int"),
    "half a surrogate pair": ('{"instruction": "Q", "output": "\\ud800"}', "surrogate"),
    "id of a wrong type": ({"id": [1], "instruction": "Q", "output": "A"}, "id is"),
    "another form": ({"question": "Q", "response": "A"}, "instruction is missing"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_listed_with_line_and_reason(tmp_path: Path, kind: str) -> None:
    row, reason = BAD_ROWS[kind]
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [alpaca(1), "", row, alpaca(2)]))
    assert [example.id for example in rows.examples] == ["e1", "e2"]
    assert [bad["line"] for bad in rows.bad] == [3]  # the empty second line counts
    assert reason in rows.bad[0]["reason"]


@pytest.mark.parametrize(
    "roles, reason",
    [
        (["assistant", "user", "assistant"], "do not take turns"),
        (["user", "user", "assistant"], "do not take turns"),
        (["user", "tool", "assistant"], "'tool'"),
        (["user"], "no assistant turn"),
        ([], "no assistant turn"),
    ],
)
def test_conversations_that_are_none(tmp_path: Path, roles: list[str], reason: str) -> None:
    good = FORMS["messages"]
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    (bad,) = read_rows(write_rows(tmp_path / "rows.jsonl", [good, row])).bad
    assert bad["line"] == 2 and reason in bad["reason"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([alpaca(1), '{"id": 5,'], "rows.jsonl:2: not valid JSON"),
        ([alpaca(1), "[1]"], "rows.jsonl:2: a row is a JSON object"),
        ([alpaca(1), alpaca(2), alpaca(1)], "rows.jsonl:3: id 'e1' was given in line 1"),
        ([{"prompt": "Q", "completion": "A"}], "no row in a known form.*completion, prompt"),
        ([], "no row in a known form"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(write_rows(tmp_path / "rows.jsonl", rows))


def test_ids_from_content_do_not_depend_on_place_and_copies_are_listed(tmp_path: Path) -> None:
    rows = [{"instruction": name, "output": "A"} for name in "abc"]
    forward = read_rows(write_rows(tmp_path / "rows.jsonl", [*rows, rows[0]]))
    backward = read_rows(write_rows(tmp_path / "rows.jsonl", rows[::-1]))
    assert [e.id for e in forward.examples] == [e.id for e in backward.examples][::-1]
    assert forward.bad == [{"line": 4, "reason": "the same as line 1"}]


def test_sample_and_split_depend_on_seed_and_ids_only(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [alpaca(number) for number in range(60)]

    def draw(name: str, rows: list, **sections: object) -> dict[str, bool]:
        (tmp_path / name).mkdir()
        artefact = prepare_instructions(recipe_for(models, tmp_path / name, rows, **sections), progress=str)
        examples = load_examples(artefact)
        assert artefact.counts["held_out"] == sum(e.held_out for e in examples)
        order = {row["id"]: place for place, row in enumerate(rows)}
        assert sorted(examples, key=lambda e: order[e.id]) == examples, "file order is lost"
        return {e.id: e.held_out for e in examples}

    some = {"data": {"samples": 20, "held_out": 5, "shard_size": 7}}
    first = draw("first", rows, **some)
    assert len(first) == 20 and sum(first.values()) == 5
    shuffled = random.Random(3).sample(rows, len(rows))
    assert draw("shuffled", shuffled, **some) == first
    assert set(first) <= set(draw("larger", rows, data={"samples": 40}))
    assert set(draw("seed", rows, seed=99, **some)) != set(first)


@pytest.mark.parametrize("seq_length", [40, 41, 42, 43, 64])  # neighbours: the cut falls on every byte of a character
def test_a_cut_response_is_the_longest_that_fits_every_model(
    models: dict[str, Path], tmp_path: Path, seq_length: int
) -> None:
    texts = ["The quick brown fox. " * 20, "日本語のテキスト" * 9, "👍🏽é" * 12, "12345 " * 30, "ok", "\r\n\0 x" * 30]
    rows = [{"id": str(i), "instruction": "Q?", "output": text} for i, text in enumerate(texts)]
    recipe = recipe_for(models, tmp_path, rows, training={"seq_length": seq_length})
    artefact = prepare_instructions(recipe, progress=str)
    formats = [load_format(recipe.target, "target"), *(load_format(o, n) for n, o in recipe.sources.items())]
    examples = load_examples(artefact)
    assert [e.truncated for e in examples] == [True, True, True, True, False, True]
    assert artefact.counts["truncated"] == 5
    for example, text in zip(examples, texts, strict=True):
        assert text.startswith(example.response)
        encoded = [
            f.encode_conversation(example.prompt(), example.response, stop=not example.truncated) for f in formats
        ]
        assert example.target_tokens == len(encoded[0].ids)
        longest = max(len(e.ids) for e in encoded)
        assert longest <= seq_length
        if example.truncated:  # up to three byte tokens are given up for a whole character
            assert longest >= seq_length - 3
            more = text[: len(example.response) + 1]
            assert max(len(f.encode_conversation(example.prompt(), more, stop=False).ids) for f in formats) > seq_length


def test_text_stays_whole_where_only_its_stop_token_is_too_much(models: dict[str, Path], tmp_path: Path) -> None:
    chat = load_format(recipe_for(models, tmp_path, [alpaca(1)]).target, "target")
    example = Example("x", None, [{"role": "user", "content": "Q"}], "abc 👍")
    length = len(chat.encode_conversation(example.prompt(), example.response).ids)
    whole, stopless, cut = (fit(example, [("target", chat)], length - less, "truncate") for less in range(3))
    assert (whole.response, whole.truncated) == ("abc 👍", False)
    assert (stopless.response, stopless.truncated) == ("abc 👍", True)
    assert (cut.response, cut.truncated) == ("abc ", True)


def test_long_examples_are_dropped_by_policy_and_the_sample_is_still_filled(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [alpaca(n) if n % 2 else alpaca(n, output="long " * 99) for n in range(20)]
    recipe = recipe_for(models, tmp_path, rows, data={"too_long": "drop", "samples": 10})
    artefact = prepare_instructions(recipe, progress=str)
    assert sorted(int(e.id[1:]) for e in load_examples(artefact)) == list(range(1, 20, 2))
    dropped = [json.loads(line) for line in (artefact.directory / "examples.dropped.jsonl").open()]
    assert artefact.counts["dropped_for_length"] == len(dropped) > 0
    assert all("tokens for" in row["reason"] for row in dropped)


def test_a_prompt_without_room_is_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [alpaca(1), alpaca(2, instruction="word " * 200)]
    artefact = prepare_instructions(recipe_for(models, tmp_path, rows), progress=str)
    assert [e.id for e in load_examples(artefact)] == ["e1"]
    assert artefact.counts["dropped_for_length"] == 1


@pytest.mark.parametrize(
    "rows, sections, message",
    [
        ([{"instruction": "Q"}], {}, "no usable row among 1.*line 1: output is missing"),
        ([alpaca(1), alpaca(2)], {"data": {"held_out": 2}}, "data.held_out is 2 but there are 2"),
        ([alpaca(1)], {"training": {"seq_length": 4}}, "no example fits --seq-length 4"),
        ([alpaca(1)], {"data": {"path": "nowhere.jsonl"}}, "data.path: nowhere.jsonl does not exist"),
    ],
)
def test_refusals_leave_nothing_behind(
    models: dict[str, Path], tmp_path: Path, rows: list[object], sections: dict, message: str
) -> None:
    recipe = recipe_for(models, tmp_path, rows, **sections)
    with pytest.raises(UserError, match=message):
        prepare_instructions(recipe, progress=str)
    assert not recipe.workdir.exists()


def test_plan_is_free_of_sources_and_other_options_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [alpaca(number) for number in range(9)]
    recipe = recipe_for(models, tmp_path, rows, data={"shard_size": 4})
    artefact = prepare_instructions(recipe, progress=str)
    assert (artefact.counts["examples"], artefact.counts["shards"]) == (9, 3)
    artefact.verify()
    one = recipe.model_copy(update={"sources": {"coarse": recipe.sources["coarse"]}})
    assert plan_instructions(one) == plan_instructions(recipe)
    assert prepare_instructions(one, progress=str).sha256 == artefact.sha256 == open_instructions(one).sha256
    other = recipe.model_copy(update={"seed": 5})
    for refuse in (prepare_instructions, open_instructions):
        with pytest.raises(UserError, match=r"seed = 1234.*5"):
            refuse(other)


def test_the_command_prints_counts_and_exits_with_2_on_bad_data(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = recipe_for(models, tmp_path, [alpaca(1), {"instruction": "Q"}])
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_none=True))  # JSON is YAML

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare", "--recipe", str(tmp_path / "recipe.yaml"), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "prepare_instructions.py"), run_name="__main__")
        return end.value.code

    assert run() == 0
    assert "bad rows: 1, dropped for length: 0, examples: 1" in capsys.readouterr().out
    broken = write_rows(tmp_path / "broken.jsonl", [alpaca(1), "{"])
    assert run("--data-path", str(broken), "--workdir", str(tmp_path / "other")) == 2
    assert "broken.jsonl:2: not valid JSON" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
