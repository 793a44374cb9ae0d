"""Laws of the instructions stage: what is read, what is refused, what a sample and a cut may depend on."""

import json
import random
import re
import runpy
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import save_tokenizer, small_recipe, write_rows
from small_tokenizers import make_tokenizer
from transformers import LlamaConfig

from megatron_fuse.chat import load_chat_format
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import (
    INSTRUCTIONS,
    example_shards,
    load_examples,
    prepare_instructions,
    read_rows,
)
from megatron_fuse.instructions.bad_rows import BadRow
from megatron_fuse.instructions.examples import Example
from megatron_fuse.instructions.length import fit
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.stages import Context
from megatron_fuse.tokenization import load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target and two sources with vocabularies of other sizes; only tokenizer and config, which is all
    this stage reads.
    """
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
    "sharegpt": {
        "system": "S",
        "conversations": [{"from": "human", "value": "Q\n\nI"}, {"from": "gpt", "value": "A"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_example(tmp_path: Path, form: str) -> None:
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [FORMS[form]]))
    (example,) = rows.read()
    assert (rows.form, rows.bad) == (form, [])
    assert (example.system, example.response) == ("S", "A")
    assert example.prompt() == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\n\nI"}]
    explicit = read_rows(write_rows(tmp_path / "rows.jsonl", [FORMS[form] | {"id": 7}]), form)
    assert [e.id for e in explicit.read()] == ["7"]


def test_several_turns_and_default_system(tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
    ]
    (example,) = read_rows(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])).read()
    assert (example.messages, example.response, example.system) == (turns[:3], "d", None)
    assert example.prompt("be brief") == [{"role": "system", "content": "be brief"}, *turns[:3]]
    assert example.prompt() == turns[:3]


BAD_ROWS = {
    "no response": ({"instruction": "Q"}, "output is missing"),
    "empty response": ({"instruction": "Q", "output": " \n"}, "response is empty"),
    "empty prompt": ({"instruction": " ", "output": "A"}, "prompt is empty"),
    "response of a wrong type": ({"instruction": "Q", "output": {"a": "A"}}, "output is a dict"),
    "prompt of a wrong type": ({"instruction": 5, "output": "A"}, "instruction is a int"),
    "half a surrogate pair": ('{"instruction": "Q", "output": "\\ud800"}', "surrogate"),
    "half a surrogate pair as id": (
        '{"id": "\\ud800", "instruction": "Q", "output": "A"}',
        "id holds half a surrogate",
    ),
    "half a surrogate pair as category": (
        '{"category": "\\ud800", "instruction": "Q", "output": "A"}',
        "category holds half a surrogate",
    ),
    "id of a wrong type": ({"id": [1], "instruction": "Q", "output": "A"}, "id is"),
    "another form": ({"question": "Q", "response": "A"}, "instruction is missing"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_listed_with_line_and_reason(tmp_path: Path, kind: str) -> None:
    row, reason = BAD_ROWS[kind]
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [alpaca(1), "", row, alpaca(2)]))
    assert rows.lines == {"e1": 1, "e2": 4}
    assert [example.id for example in rows.read()] == ["e1", "e2"]
    assert [example.id for example in rows.read({"e2"})] == ["e2"]
    assert [bad["line"] for bad in rows.bad] == [3]  # the empty second line counts
    assert reason in rows.bad[0]["reason"]


@pytest.mark.parametrize(
    "roles, reason",
    [
        (["user", "user", "assistant"], "two turns of user follow each other"),
        (["user", "tool", "assistant"], "a tool's turn has no call before it"),
        (["user", ["assistant"]], "role of a turn is ['assistant']"),
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
        ([alpaca(1), "[1]"], "rows.jsonl:2: a row must be a JSON object"),
        ([{"prompt": "Q", "completion": "A"}], "no row has a known form.*completion, prompt"),
        ([], "no row has a known form"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(write_rows(tmp_path / "rows.jsonl", rows))


def save_table(path: Path, rows: list[dict]) -> Path:
    """The rows in the form that the name asks for; a directory's in two files."""
    import pyarrow
    import pyarrow.parquet

    if path.name == "rows.jsonl":
        return write_rows(path, rows)
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
        return path
    path.mkdir()
    halves = {"data-00000": table.slice(0, 3), "data-00001": table.slice(3)}
    for name, part in halves.items():
        if path.name == "parquet":
            pyarrow.parquet.write_table(part, path / f"{name}.parquet")
        else:
            with pyarrow.ipc.new_stream(path / f"{name}.arrow", part.schema) as file:
                file.write_table(part)
    if path.name == "saved":
        names = [{"filename": f"{name}.arrow"} for name in halves]
        (path / "state.json").write_text(
            json.dumps({"_data_files": names, "_format_type": None, "_split": "train"})
        )
    return path


TABLES = ["rows.jsonl", "rows.parquet", "parquet", "saved"]


def test_every_kind_of_table_gives_the_same_examples(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    turns = [{"role": role, "content": f"{role} \r\n\0 été 🙂"} for role in ("user", "assistant")]
    rows = [{"id": n, "messages": turns} for n in range(3)] + [
        {"id": 3, "messages": turns[:1]},
        {"id": 4, "messages": turns},
    ]
    made = {}
    for name in TABLES:
        (tmp_path / name).mkdir()
        data = {"path": str(save_table(tmp_path / name / name, rows)), "shard_size": 2}
        recipe = recipe_for(models, tmp_path / name, [], data=data)
        artifact = prepare_instructions(Context(recipe))
        made[name] = {path.name: path.read_bytes() for path in artifact.files(".jsonl")}
        assert Context(recipe).open(INSTRUCTIONS).counts["examples"] == 4
        assert prepare_instructions(Context(recipe)).sha256 == artifact.sha256
        assert made[name]["examples.bad_rows.jsonl"] == (
            b'{"line": 4, "kind": "no assistant turn", "reason": "no assistant turn"}\n'
        )
    assert all(files == made["rows.jsonl"] for files in made.values())


@pytest.mark.parametrize("name", TABLES[1:])
def test_a_damaged_table_is_named(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    path = save_table(tmp_path / name, [{"instruction": f"Q{n}", "output": f"{n}" * 99} for n in range(5)])
    damaged = path if path.is_file() else sorted(path.iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{damaged.name}: cannot be read after [03] rows"):
        read_rows(path)


def test_directories_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no .*parquet file and no state\.json"):
        read_rows(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        UserError, match=r"several splits\. Name the directory of one of them \(train, test\)"
    ):
        read_rows(tmp_path)


@pytest.mark.parametrize("splits", ["null", "5", '"train"', "[null]", '[["train"]]', "{}"])
def test_a_damaged_list_of_splits_is_named(tmp_path: Path, splits: str) -> None:
    (tmp_path / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
    with pytest.raises(UserError, match=r"dataset_dict.json: splits"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        "null",
        "5",
        "[]",
        "[5]",
        "[{}]",
        '[{"filename": 5}]',
        '[{"filename": "../x.arrow"}]',
        f'[{{"filename": "{"x" * 5000}"}}]',
    ],
)
def test_a_damaged_state_of_a_saved_data_set_is_named(tmp_path: Path, files: str) -> None:
    (tmp_path / "state.json").write_text(f'{{"_data_files": {files}}}')
    with pytest.raises(UserError, match=r"state.json: _data_files"):
        read_rows(tmp_path)


def test_a_file_of_a_saved_data_set_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    with pytest.raises(UserError, match=r"state.json: _data_files: the file x.arrow is missing"):
        read_rows(tmp_path)


def test_false_offsets_in_an_arrow_file_are_refused(tmp_path: Path) -> None:
    """Arrow reads by them as they are; far enough outside, the process died."""
    pyarrow = pytest.importorskip("pyarrow")
    path = save_table(tmp_path / "saved", [{"instruction": f"Q{n}", "output": "A" * 99} for n in range(5)])
    file = path / "data-00000.arrow"
    with pyarrow.ipc.open_stream(file.read_bytes()) as stream:
        offsets = next(iter(stream)).column("output").buffers()[1].to_pybytes()
    data = file.read_bytes()
    assert data.count(offsets[4:16]) == 1
    file.write_bytes(data.replace(offsets[4:16], offsets[4:8] + b"\xff\xff\xff\x7f" + offsets[12:16]))
    with pytest.raises(UserError, match=r"data-00000.arrow: cannot be read after 0 rows"):
        list(read_rows(path).read())


@pytest.mark.parametrize("key", ["id", "category"])
def test_a_row_without_characters_leaves_no_directory(
    models: dict[str, Path], tmp_path: Path, key: str
) -> None:
    recipe = recipe_for(models, tmp_path, [f'{{"instruction": "Q", "output": "A", "{key}": "\\ud800"}}'])
    with pytest.raises(
        UserError,
        match=rf"data.jsonl: none of its .* rows can be used .*line 1: {key} holds half a surrogate pair",
    ):
        prepare_instructions(Context(recipe))
    assert not recipe.workdir.exists()


def test_ids_from_content_do_not_depend_on_place_and_copies_are_listed(tmp_path: Path) -> None:
    rows = [{"instruction": name, "output": "A"} for name in "abc"]
    forward = read_rows(write_rows(tmp_path / "rows.jsonl", [*rows, rows[0]]))
    backward = read_rows(write_rows(tmp_path / "rows.jsonl", rows[::-1]))
    assert list(forward.lines) == list(backward.lines)[::-1]
    assert forward.bad == [{"line": 4, "kind": "copy of an earlier row", "reason": "the same as line 1"}]


def test_sample_and_split_depend_on_seed_and_ids_only(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [alpaca(number) for number in range(60)]

    def draw(name: str, rows: list, **sections: object) -> dict[str, bool]:
        (tmp_path / name).mkdir()
        artifact = prepare_instructions(Context(recipe_for(models, tmp_path / name, rows, **sections)))
        examples = load_examples(artifact)
        assert artifact.counts["held_out"] == sum(e.is_validation for e in examples)
        order = {row["id"]: place for place, row in enumerate(rows)}
        assert sorted(examples, key=lambda e: order[e.id]) == examples, "file order is lost"
        return {e.id: e.is_validation for e in examples}

    some = {"data": {"samples": 20, "validation_samples": 5, "shard_size": 7}}
    first = draw("first", rows, **some)
    assert len(first) == 20 and sum(first.values()) == 5
    shuffled = random.Random(3).sample(rows, len(rows))
    assert draw("shuffled", shuffled, **some) == first
    assert set(first) <= set(draw("larger", rows, data={"samples": 40}))
    assert set(draw("seed", rows, seed=99, **some)) != set(first)


def test_a_directory_made_under_the_old_name_of_a_key_goes_on(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Recorded names stay as they were, so that plans of older versions are plans of today's recipes."""
    data = {"samples": 5, "validation_samples": 2}
    recipe = recipe_for(models, tmp_path, [alpaca(number) for number in range(9)], data=data)
    artifact = prepare_instructions(Context(recipe))
    recorded = {
        "seed": recipe.seed,
        "seq_length": recipe.training.seq_length,
        "format": "auto",
        "samples": 5,
        "held_out": 2,
        "too_long": "truncate",
        "supervise": "every_turn",
        "normalize": "none",
        "strip": False,
        "reasoning": "template",
        "shard_size": recipe.data.shard_size,
    }
    plan = json.loads((artifact.directory / "plan.json").read_text())
    assert list(plan["options"].items()) == list(recorded.items())
    rows = [json.loads(line) for path in artifact.files(".jsonl") for line in path.read_text().splitlines()]
    assert sum(row.get("held_out", False) for row in rows) == artifact.counts["held_out"] == 2
    made = {path: path.stat().st_mtime_ns for path in artifact.directory.iterdir()}
    content = recipe.model_dump(mode="json", by_alias=True)
    content["data"]["held_out"] = content["data"].pop("validation_samples")
    with pytest.warns(FutureWarning, match=r"data\.held_out is deprecated: write data\.validation_samples"):
        older = make_recipe(content)
    again = prepare_instructions(Context(older))
    assert again.sha256 == artifact.sha256
    assert made == {path: path.stat().st_mtime_ns for path in artifact.directory.iterdir()}


# Neighbours: the cut falls on every byte of a character.
@pytest.mark.parametrize("seq_length", [40, 41, 42, 43, 64])
def test_a_cut_response_is_the_longest_that_fits_every_model(
    models: dict[str, Path], tmp_path: Path, seq_length: int
) -> None:
    texts = [
        "The quick brown fox. " * 20,
        "日本語のテキスト" * 9,
        "👍🏽é" * 12,
        "12345 " * 30,
        "ok",
        "\r\n\0 x" * 30,
    ]
    rows = [{"id": str(i), "instruction": "Q?", "output": text} for i, text in enumerate(texts)]
    recipe = recipe_for(models, tmp_path, rows, training={"seq_length": seq_length})
    artifact = prepare_instructions(Context(recipe))
    formats = [load_format(recipe.target, "target"), *(load_format(o, n) for n, o in recipe.sources.items())]
    examples = load_examples(artifact)
    assert [e.truncated for e in examples] == [True, True, True, True, False, True]
    assert artifact.counts["truncated"] == 5
    for example, text in zip(examples, texts, strict=True):
        assert text.startswith(example.response)
        encoded = [
            f.encode_conversation(example.prompt(), example.response, stop=not example.truncated)
            for f in formats
        ]
        assert example.target_tokens == len(encoded[0].ids)
        longest = max(len(e.ids) for e in encoded)
        assert longest <= seq_length
        if example.truncated:  # up to three byte tokens are given up for a whole character
            assert longest >= seq_length - 3
            more = text[: len(example.response) + 1]
            assert (
                max(len(f.encode_conversation(example.prompt(), more, stop=False).ids) for f in formats)
                > seq_length
            )


def test_text_stays_whole_where_only_its_stop_token_is_too_much(
    models: dict[str, Path], tmp_path: Path
) -> None:
    chat = load_format(recipe_for(models, tmp_path, [alpaca(1)]).target, "target")
    example = Example("x", None, [{"role": "user", "content": "Q"}], "abc 👍")
    length = len(chat.encode_conversation(example.prompt(), example.response).ids)
    whole, stopless, cut = (fit(example, [("target", chat)], length - less) for less in range(3))
    assert (whole.response, whole.truncated) == ("abc 👍", False)
    assert (stopless.response, stopless.truncated) == ("abc 👍", True)
    assert (cut.response, cut.truncated) == ("abc ", True)


# llama2 keeps every turn's white space and ends it with EOS; vicuna_v1.1's first token of a turn is a leading
# one.
@pytest.mark.parametrize("template", ["chatml", "vicuna_v1.1", "llama2"])
@pytest.mark.parametrize("every_turn", [False, True])
def test_only_the_last_response_is_cut_at_any_length(tmp_path: Path, template: str, every_turn: bool) -> None:
    kinds = ["byte_level"] if template == "chatml" else ["sentencepiece", "llama_json"]
    formats = [
        (kind, load_chat_format(load_tokenizer(make_tokenizer(kind, tmp_path / kind)), template))
        for kind in kinds
    ]
    turns = ["international?", "Sure: été 🙂", "and 12?", "x", "more", "nation 日本 answer"]
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, turns, strict=True)
    ]
    example = Example("x", None, messages[:-1], turns[-1])

    def tokens(text: str, stop: bool) -> int:
        encoded = [
            f.encode_conversation(messages[:-1], text, stop=stop, every_turn=every_turn) for _, f in formats
        ]
        return max(len(e.ids) for e in encoded)

    outcomes = set()
    for seq_length in range(tokens("", False) - 2, tokens(turns[-1], True) + 1):
        try:
            fitted = fit(example, formats, seq_length, every_turn=every_turn)
        except BadRow as reason:
            outcomes.add("left out")
            assert tokens("n", False) > seq_length, seq_length
            assert re.search("leaves no room: [0-9]+ tokens for", str(reason)), seq_length
            continue
        outcomes.add("cut" if fitted.truncated else "whole")
        assert fitted.messages == example.messages and turns[-1].startswith(fitted.response), seq_length
        assert tokens(fitted.response, not fitted.truncated) <= seq_length, seq_length
        if fitted.truncated and fitted.response != turns[-1]:
            assert tokens(turns[-1][: len(fitted.response) + 1], False) > seq_length, (
                f"{seq_length}: more would fit"
            )
    assert outcomes == {"left out", "cut", "whole"}


def test_long_examples_are_dropped_by_policy_and_the_sample_is_still_filled(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [alpaca(n) if n % 2 else alpaca(n, output="long " * 99) for n in range(20)]
    recipe = recipe_for(models, tmp_path, rows, data={"too_long": "drop", "samples": 10})
    artifact = prepare_instructions(Context(recipe))
    assert sorted(int(e.id[1:]) for e in load_examples(artifact)) == list(range(1, 20, 2))
    dropped = [json.loads(line) for line in (artifact.directory / "examples.dropped.jsonl").open()]
    assert artifact.counts["dropped_for_length"] == len(dropped) > 0
    assert all("tokens for" in row["reason"] for row in dropped)


def test_a_prompt_without_room_is_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [alpaca(1), alpaca(2, instruction="word " * 200)]
    artifact = prepare_instructions(Context(recipe_for(models, tmp_path, rows)))
    assert [e.id for e in load_examples(artifact)] == ["e1"]
    assert artifact.counts["dropped_for_length"] == 1


_MEGABYTES = [("word ", "truncate"), ("a", "drop"), ("\r\n", "truncate")]
_MORE_MEGABYTES = [("a", "truncate")] + [
    (text, policy) for text in ("🙂", "e\u0301", "\0") for policy in ("truncate", "drop")
]


@pytest.mark.parametrize(
    ("text", "policy"),
    [*_MEGABYTES, *(pytest.param(*case, marks=pytest.mark.slow) for case in _MORE_MEGABYTES)],
    ids=ascii,
)
def test_a_megabyte_is_cut_or_dropped(
    models: dict[str, Path], tmp_path: Path, text: str, policy: str
) -> None:
    whole = text * (10**6 // len(text.encode())) + "end"
    recipe = recipe_for(models, tmp_path, [alpaca(1), alpaca(2, output=whole)], data={"too_long": policy})
    artifact = prepare_instructions(Context(recipe))
    dropped = [json.loads(line)["reason"] for line in (artifact.directory / "examples.dropped.jsonl").open()]
    assert [e.id for e in load_examples(artifact)] == (["e1"] if dropped else ["e1", "e2"])
    if policy == "drop":
        assert re.fullmatch(r"[0-9]+ tokens for target, seq_length is 128", *dropped)
    elif not text.strip():
        assert re.match("the prompt leaves room for white space only: ", *dropped)
    else:
        _, cut = load_examples(artifact)
        assert cut.truncated and len(cut.response) > 10 and whole.startswith(cut.response)


def test_earlier_turns_count_as_the_recipe_supervises_them(models: dict[str, Path], tmp_path: Path) -> None:
    """A template that forgets earlier turns cannot show them to be learned, and need not where the last
    one alone is.
    """
    template = tmp_path / "last.jinja"
    template.write_text("{{ messages[-1]['content'] }}{{ '<|im_end|>' if not add_generation_prompt }}")
    turns = [{"role": role, "content": role} for role in ["user", "assistant"] * 2]
    recipe = recipe_for(models, tmp_path, [{"messages": turns}], data={"supervise": "last_turn"})
    recipe = recipe.model_copy(
        update={"target": recipe.target.model_copy(update={"chat_template": str(template)})}
    )
    prepare_instructions(Context(recipe))
    every = recipe.model_copy(update={"data": recipe.data.model_copy(update={"supervise": "every_turn"})})
    with pytest.raises(UserError, match=r"options\.supervise = 'last_turn', but now .* 'every_turn'"):
        Context(every).open(INSTRUCTIONS)
    with pytest.raises(UserError, match="prints 0 of the 1 earlier assistant turns"):
        prepare_instructions(Context(every.model_copy(update={"workdir": tmp_path / "other"})))


@pytest.mark.parametrize(
    "rows, sections, message",
    [
        ([{"instruction": "Q"}], {}, "none of its 1 rows can be used.*line 1: output is missing"),
        (
            [alpaca(1), alpaca(2)],
            {"data": {"validation_samples": 2}},
            "data.validation_samples is 2, but there are only 2",
        ),
        ([alpaca(1)], {"training": {"seq_length": 4}}, "no example fits --seq-length 4"),
        ([alpaca(1)], {"data": {"path": "nowhere.jsonl"}}, "data.path: nowhere.jsonl does not exist"),
    ],
)
def test_refusals_leave_nothing_behind(
    models: dict[str, Path], tmp_path: Path, rows: list[object], sections: dict, message: str
) -> None:
    recipe = recipe_for(models, tmp_path, rows, **sections)
    with pytest.raises(UserError, match=message):
        prepare_instructions(Context(recipe))
    assert not recipe.workdir.exists()


def test_texts_are_in_memory_one_shard_at_a_time(models: dict[str, Path], tmp_path: Path) -> None:
    """A file ten times as long takes as much memory, to prepare and to read again."""

    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peaks = []
    for run, examples in enumerate((4, 4, 24)):  # the first is for what stays in memory after it
        (tmp_path / str(run)).mkdir()
        rows = [alpaca(n, instruction="Question? " * 1000) for n in range(examples)]  # 10 kB each
        recipe = recipe_for(
            models, tmp_path / str(run), rows, data={"shard_size": 2}, training={"seq_length": 10**6}
        )
        prepared = peak(lambda recipe=recipe: prepare_instructions(Context(recipe)))
        shards = example_shards(Context(recipe).open(INSTRUCTIONS))
        peaks.append((prepared, peak(lambda shards=shards: [len(shard) for shard in shards])))
    for few, many in zip(*peaks[1:], strict=True):
        assert many < few + 100_000, peaks  # ids and counts grow; the texts by 200 kB


def test_plan_is_free_of_sources_and_other_options_are_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [alpaca(number) for number in range(9)]
    recipe = recipe_for(models, tmp_path, rows, data={"shard_size": 4})
    artifact = prepare_instructions(Context(recipe))
    assert (artifact.counts["examples"], artifact.counts["shards"]) == (9, 3)
    artifact.verify()
    one = recipe.model_copy(update={"sources": {"coarse": recipe.sources["coarse"]}})
    assert Context(one).plan(INSTRUCTIONS) == Context(recipe).plan(INSTRUCTIONS)
    assert (
        prepare_instructions(Context(one)).sha256 == artifact.sha256 == Context(one).open(INSTRUCTIONS).sha256
    )
    other = recipe.model_copy(update={"seed": 5})
    for refuse in (prepare_instructions, lambda context: context.open(INSTRUCTIONS)):
        with pytest.raises(UserError, match=r"seed = 1234.*5"):
            refuse(Context(other))


def test_the_command_prints_counts_and_exits_with_2_on_bad_data(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = recipe_for(models, tmp_path, [alpaca(1), {"instruction": "Q"}])
    # JSON is YAML.
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_none=True))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare", "--recipe", str(tmp_path / "recipe.yaml"), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "prepare_instructions.py"), run_name="__main__")
        return end.value.code

    assert run() == 0
    printed = capsys.readouterr().out
    assert "bad rows: 1, leading answers left off: 0, dropped for length: 0, examples: 1" in printed
    assert re.search(r"^value missing +1  line 2$", printed, re.MULTILINE)
    broken = write_rows(tmp_path / "broken.jsonl", [alpaca(1), "{"])
    assert run("--data-path", str(broken), "--workdir", str(tmp_path / "other")) == 2
    assert "broken.jsonl:2: not valid JSON" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
