"""Laws of answers from a file: each stands as it was given, beside its own example, however the file says
which that is.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_lines import logged
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES, Response, generate_responses, response_shards
from megatron_fuse.stages import Context
from megatron_fuse.storage import Artifact
from megatron_fuse.storage.rows import keys_of, value_at

DATA = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "mpt", "mpt")


def recipe_for(
    model: Path, workdir: Path, data: list[dict[str, Any]], responses: object, **sections: Any
) -> Recipe:
    """One source, `file`, whose answers are given; instructions prepared, in shards of four."""
    path = write_rows(workdir / "data.jsonl", data)
    sections = {"data": {"shard_size": 4}} | sections
    recipe = small_recipe(
        workdir / "run", path, model, {"file": {"model": str(model), "responses": responses}}, **sections
    )
    prepare_instructions(Context(recipe))
    return recipe


def questions(count: int = 10) -> list[dict[str, Any]]:
    return [{"id": f"e{n}", "instruction": f"Question {n}?", "output": "A."} for n in range(count)]


def rows_of(artifact: Artifact) -> dict[str, Response]:
    return {row.id: row for shard in response_shards(artifact) for row in shard}


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSONL, or Parquet by the path's suffix."""
    if path.suffix != ".parquet":
        return write_rows(path, rows)
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=3
    )
    return path


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_answers_from_a_file(model: Path, tmp_path: Path, name: str) -> None:
    given = [{"id": f"e{n}", "response": f" answer {n}\r\n"} for n in range(10) if n not in (3, 6)]
    given += [
        {"id": "e3", "response": None},
        {"id": "more", "response": "x"},
        {"id": "e7", "response": " answer 7\r\n"},
    ]
    given = [row | {"truncated": row["id"] == "e2"} for row in given]
    given[4] |= {"response": "I'm sorry, but I can't help with that."}
    path = write_table(tmp_path / name, given)
    recipe = recipe_for(model, tmp_path, questions(), str(path))
    with logged() as text:
        artifact = generate_responses(Context(recipe), "file")
    said = text.getvalue().splitlines()
    assert artifact.sha256 == Context(recipe).open(RESPONSES, "file").sha256
    rows = rows_of(artifact)
    expected = {row["id"]: row["response"] or "" for row in given if row["id"] != "more"} | {"e6": ""}
    assert {key: row.response for key, row in rows.items()} == expected
    assert list(rows) == [f"e{n}" for n in range(10)]
    assert [key for key, row in rows.items() if row.truncated] == ["e2"]
    assert [key for key, row in rows.items() if row.refused] == ["e5"] == [given[4]["id"]]
    assert all(row.tokens > 0 for row in rows.values() if row.response)
    counts = {key: artifact.counts[key] for key in ("unmatched", "empty", "examples", "refused", "truncated")}
    assert counts == {"unmatched": 2, "empty": 2, "examples": 10, "refused": 1, "truncated": 1}
    assert [path.read_text() for path in artifact.files(".unmatched.txt")] == ["e3\n", "e6\n"]
    assert any("1 of 11 rows belong to no example, among them 'more'" in line for line in said)

    write_table(path, [*given, {"id": "e6", "response": "late", "truncated": False}])
    with pytest.raises(UserError, match=r"inputs\.responses file"):
        generate_responses(Context(recipe), "file")


def test_neither_order_nor_ranks_nor_the_key_decide(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = questions()
    given = [
        {"id": row["id"], "q": f"\n{row['instruction']} ", "response": f"to {row['id']}"} for row in data
    ]
    path = write_rows(tmp_path / "answers.jsonl", given)
    recipe = recipe_for(model, tmp_path, data, {"path": str(path), "match": "prompt", "prompt": "q"})
    artifact = generate_responses(Context(recipe), "file")
    expected = rows_of(artifact)
    assert [row.response for row in expected.values()] == [f"to e{n}" for n in range(10)]

    for leftover in artifact.directory.iterdir():
        leftover.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert generate_responses(Context(recipe), "file") is None
    monkeypatch.setenv("RANK", "0")
    assert generate_responses(Context(recipe), "file").sha256 == artifact.sha256
    monkeypatch.delenv("WORLD_SIZE")

    backwards = write_rows(tmp_path / "backwards.jsonl", given[::-1])
    (tmp_path / "by_id").mkdir()
    by_id = recipe_for(model, tmp_path / "by_id", data, str(backwards))
    assert rows_of(generate_responses(Context(by_id), "file")) == expected
    assert Context(by_id).plan(RESPONSES, "file").options != Context(recipe).plan(RESPONSES, "file").options


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_a_list_of_messages_is_compared_as_a_whole(model: Path, tmp_path: Path) -> None:
    """Three conversations end in the same question, and two of them in the same turns under another system
    message.
    """
    data = [
        {"id": "first", "messages": turns("A?", "a", "Why?", "gt")},
        {"id": "second", "messages": turns("B?", "b", "Why?", "gt")},
        {"id": "wizard", "system": "Wizard.", "messages": turns("B?", "b", "Why?", "gt")},
        {"id": "short", "system": "Brief.", "messages": turns("Why?", "gt")},
    ]
    given = [
        {"prompt": turns("A?", "a", " Why?\n"), "response": "of the first"},
        {
            "prompt": [{"role": "system", "content": "Wizard."}, *turns("B?", "b", "Why?")],
            "response": "of the wizard",
        },
        {"prompt": turns("B?", "b", "Why?"), "response": "of the second"},
        {"prompt": [{"role": "system", "content": "Other."}, *turns("Why?")], "response": "of nobody"},
        {"prompt": "Why?", "response": "of the last message"},
    ]
    path = write_rows(tmp_path / "answers.jsonl", given)
    recipe = recipe_for(model, tmp_path, data, {"path": str(path), "match": "prompt"})
    rows = rows_of(generate_responses(Context(recipe), "file"))
    assert {key: row.response for key, row in rows.items()} == {
        "first": "of the first",
        "second": "of the second",
        "wizard": "of the wizard",
        "short": "of the last message",
    }


def test_a_last_message_answers_one_conversation_only(model: Path, tmp_path: Path) -> None:
    """The same messages under another system message are one conversation; what went before makes another."""
    path = write_rows(
        tmp_path / "answers.jsonl", [{"prompt": "B?", "response": "b"}, {"prompt": "Why?", "response": "c"}]
    )
    data = [
        {"id": "one", "messages": turns("Why?", "gt")},
        {"id": "same", "system": "Brief.", "messages": turns(" Why?", "gt")},
        {"id": "last", "messages": turns("B?", "gt")},
    ]
    options = {"path": str(path), "match": "prompt"}
    (tmp_path / "alike").mkdir()
    rows = rows_of(generate_responses(Context(recipe_for(model, tmp_path / "alike", data, options)), "file"))
    assert {key: row.response for key, row in rows.items()} == {"one": "c", "same": "c", "last": "b"}
    data[2]["messages"] = turns("B?", "b", "Why?", "gt")
    recipe = recipe_for(model, tmp_path, data, options)
    with pytest.raises(
        UserError,
        match=rf"{path}:2: the conversations of 'one' and 'last' are different, but both end in the same "
        r"prompt",
    ):
        generate_responses(Context(recipe), "file")


ID, PROMPT = {}, {"match": "prompt"}


@pytest.mark.parametrize(
    "options, rows, message",
    [
        (
            ID,
            [{"id": "e1", "response": "a"}, {"id": "e1", "response": "b"}],
            "jsonl:2: id 'e1' is also in line 1",
        ),
        (
            ID,
            [{"id": "e1", "response": "a"}, {"id": "e1", "response": "a", "truncated": True}],
            "jsonl:2: .* line 1",
        ),
        (
            ID,
            [{"id": "e1", "response": None}],
            "no row of an example has an answer under response .*line 1 has id, response",
        ),
        (ID, [{"id": "e1", "responses": {"x": "a", "y": "b"}}], r"line 1 has id, responses\.x, responses\.y"),
        ({"response": "r"}, [{"id": "e1", "r": {"x": "a"}}], r"jsonl:1: r is a dict, .*\. Name one of r\.x"),
        (ID, [{"id": "e1", "response": ["a"]}], "jsonl:1: response is a list, not the text"),
        (ID, [{"id": "e1", "response": "a", "truncated": "no"}], "jsonl:1: truncated is 'no'"),
        (
            ID,
            ['{"id": "e1", "response": "\\udc00"}'],
            "jsonl:1: response holds half a surrogate pair at character 0",
        ),
        (ID, [{"id": "zz", "response": "a"}], "none of its 1 ids .*'e0'.*'zz'"),
        (ID, [{"id": True, "response": "a"}], "jsonl:1: id is True"),
        (ID, [{"response": "a"}], "jsonl:1: id is None"),
        (
            PROMPT,
            [{"prompt": "zz", "response": "a"}],
            r"none of its 1 prompts .*'Question 0\?'.*'zz'.*match: id",
        ),
        (PROMPT, [{"question": "zz"}], r"jsonl:1: prompt is None, but .*The row has question"),
        (PROMPT, [{"prompt": ["zz"]}], r"jsonl:1: prompt is \['zz'\], but .*list of \{role, content\}"),
        (PROMPT, [{"prompt": [{"role": "user", "content": None}]}], r"jsonl:1: prompt is "),
        (
            PROMPT,
            [{"prompt": "Question 1?", "response": "a"}, {"prompt": " Question 1?", "response": "b"}],
            r"jsonl:2: prompt ' Question 1\?' is also in line 1",
        ),
        (ID, ["{"], "jsonl:1: not valid JSON"),
        (ID, [], "none of its 0 ids"),
        (ID, None, "sources.file.responses: .*does not exist"),
    ],
)
def test_files_that_are_refused(
    model: Path, tmp_path: Path, options: dict[str, str], rows: list | None, message: str
) -> None:
    path = tmp_path / "answers.jsonl"
    if rows is not None:
        write_rows(path, rows)
    recipe = recipe_for(model, tmp_path, questions(), {"path": str(path), **options})
    with pytest.raises(UserError, match=message):
        generate_responses(Context(recipe), "file")
    assert not (recipe.workdir / "responses").exists()


@given(st.lists(st.text("ab.-", min_size=1, max_size=5), min_size=1, max_size=4), st.integers())
def test_dots_lead_into_mappings_whose_keys_may_hold_dots(path: list[str], value: int) -> None:
    row: Any = value
    for key in reversed(path):
        row = {key: row}
    assert value_at(row, ".".join(path)) == value
    assert value_at(row, ".".join([*path, "c"])) is None


def test_the_longest_key_wins() -> None:
    row = {"a": {"b": 1, "b.c": 2}, "a.b": {"c": 3}, "d": None}
    assert [value_at(row, key) for key in ("a.b.c", "a", "d", "d.e", "e")] == [3, row["a"], None, None, None]
    assert keys_of(row) == "a.b, a.b.c, a.b.c, d"


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")
@pytest.mark.parametrize("match", ["id", "prompt"])
def test_real_answers_are_all_found(model: Path, tmp_path: Path, match: str) -> None:
    """Three models' answers by nested keys, one of which holds a dot, to instructions with GPT-4's as
    ground truth.
    """
    path = DATA / "responses/mt_bench.jsonl"
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    names = ("vicuna-7b-v1.5", "llama-2-7b-chat", "mpt-7b-chat")
    data = [
        {key: row[key] for key in ("id", "instruction")} | {"output": row["responses"]["gpt-4"]}
        for row in rows
    ]
    key = {"match": match, "prompt": "instruction"}
    sources = {
        name: {"model": str(model), "responses": {"path": str(path), "response": f"responses.{name}", **key}}
        for name in names
    }
    recipe = small_recipe(
        tmp_path / "run",
        write_rows(tmp_path / "data.jsonl", data),
        model,
        sources,
        training={"seq_length": 8192},
    )
    prepare_instructions(Context(recipe))
    for name in names:
        artifact = generate_responses(Context(recipe), name)
        assert (artifact.counts["examples"], artifact.counts["unmatched"]) == (40, 0)
        assert {key: row.response for key, row in rows_of(artifact).items()} == {
            row["id"]: row["responses"][name] for row in rows
        }


def test_prompts_are_found_in_either_unicode_form(model: Path, tmp_path: Path) -> None:
    """data.normalize may have composed the prompts of the examples, not those of the file."""
    write_rows(tmp_path / "answers.jsonl", [{"prompt": "cafe\u0301?", "response": "yes"}])
    options = {"path": str(tmp_path / "answers.jsonl"), "match": "prompt"}
    data = [{"id": "e0", "instruction": "cafe\u0301?", "output": "A."}]
    recipe = recipe_for(model, tmp_path, data, options)
    normalized = recipe.data.model_copy(update={"normalize": "nfc"})
    recipe = recipe.model_copy(update={"data": normalized, "workdir": tmp_path / "normalized"})
    prepare_instructions(Context(recipe))
    assert [row.response for row in rows_of(generate_responses(Context(recipe), "file")).values()] == ["yes"]
