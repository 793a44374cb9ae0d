"""Laws of rows as people have them: what is read, what a mask leaves out, which ids are certain, what is
listed by which kind.
"""

from pathlib import Path

import numpy as np
import pytest
from small_models import save_model, small_recipe, write_rows
from small_tokenizers import make_tokenizer

from megatron_fuse.chat import ChatFormat, load_chat_format, supervised_turns
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example, read_rows
from megatron_fuse.instructions.bad_rows import Kind
from megatron_fuse.instructions.forms import FORMS
from megatron_fuse.recipe.models import SourceOptions
from megatron_fuse.responses.served import _Format
from megatron_fuse.storage.rows import id_at
from megatron_fuse.tokenization import load_tokenizer
from megatron_fuse.tokenization.spans import response_bytes

DOCUMENT = Path(__file__).parents[2] / "docs/data.md"


def turns(*said: str, **masks: object) -> dict:
    """A row: "u: text" is the user's, "a: text" the assistant's, another letter that of a role's name; a
    mask is of turn tN.
    """
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = []
    for number, entry in enumerate(said):
        role, _, content = entry.partition(": ")
        messages.append({"role": roles.get(role, role), "content": content} | masks.get(f"t{number}", {}))
    return {"messages": messages}


def read_one(path: Path, row: dict, **options: object) -> Example | dict:
    """The row's example, or its listing."""
    rows = read_rows(write_rows(path / "rows.jsonl", [row]), "auto", **options)
    return next(rows.read()) if len(rows) else rows.bad[0]


def test_text_parts_are_joined_and_columns_of_turns_are_turns(tmp_path: Path) -> None:
    plain = read_one(tmp_path, turns("s: S", "u: one two", "a: A"))
    parts = turns("s: S", "u: ", "a: A")
    parts["messages"][1]["content"] = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert read_one(tmp_path, parts) == plain
    columns = {"messages": {"role": ["system", "user", "assistant"], "content": ["S", "one two", "A"]}}
    assert read_one(tmp_path, columns) == plain


def test_a_leading_answer_is_left_off_and_counted(tmp_path: Path) -> None:
    said = ["u: Q", "a: A", "u: R", "a: B"]
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [turns("s: S", "a: Hello!", *said), turns(*said)]))
    first, second = rows.read()
    assert (first.messages, first.response) == (second.messages, second.response)
    assert (first.system, rows.began_with_answer, rows.bad) == ("S", 1, [])


LISTED = {
    "an image": (turns("u: ", "a: A") | {"x": 0}, Kind.NOT_TEXT, "image_url"),
    "a number as content": (
        {"messages": [{"role": "user", "content": 5}]},
        Kind.NOT_TEXT,
        "content is a int",
    ),
    "null": ({"messages": [{"role": "user", "content": None}]}, Kind.MISSING, "content is missing"),
    "no turns": ({"messages": "hello"}, Kind.NO_TURNS, "not a list of turns"),
    "columns of two lengths": (
        {"messages": {"role": ["user"], "content": []}},
        Kind.NO_TURNS,
        "different lengths",
    ),
    "two users": (turns("u: Q", "u: R", "a: A"), Kind.SAME_ROLE, "two turns of user follow each other"),
    "two answers": (
        turns("u: Q", "a: A", "a: B"),
        Kind.SAME_ROLE,
        "two turns of assistant follow each other",
    ),
    "two leading answers": (
        turns("a: A", "a: B", "u: Q", "a: C"),
        Kind.SAME_ROLE,
        "two turns of assistant follow each other",
    ),
    "a late system turn": (turns("u: Q", "s: S", "a: A"), Kind.LATE_SYSTEM, "the system's"),
    "a leading answer alone": (
        turns("a: A", "u: Q"),
        Kind.NO_ANSWER,
        "no assistant turn after a user's turn",
    ),
    "no answer": (turns("u: Q"), Kind.NO_ANSWER, "no assistant turn"),
    "an unknown role": (turns("u: Q", "bot: A"), Kind.UNKNOWN_ROLE, "'bot'"),
    "an empty answer": (turns("u: Q", "a:  "), Kind.EMPTY, "response is empty"),
    "half a weight": (turns("u: Q", "a: A", t1={"weight": 0.5}), Kind.BAD_MASK, "weight of a turn is 0.5"),
    "a mask of text": (turns("u: Q", "a: A", t1={"train": "no"}), Kind.BAD_MASK, "train of a turn is 'no'"),
    "masks at odds": (turns("u: Q", "a: A", t1={"weight": 0, "loss": True}), Kind.BAD_MASK, "contradict"),
    "a mask of the last": (
        turns("u: Q", "a: A", t1={"loss": False}),
        Kind.MASKED,
        "every assistant turn is masked",
    ),
    "an id beyond floats": (turns("u: Q", "a: A") | {"id": 1e20}, Kind.BAD_ID, "id is 1e+20"),
    "a broken id": (turns("u: Q", "a: A") | {"id": 1.5}, Kind.BAD_ID, "id is 1.5"),
}
LISTED["an image"][0]["messages"][0]["content"] = [
    {"type": "text", "text": "Q"},
    {"type": "image_url", "image_url": "x"},
]


@pytest.mark.parametrize("name", LISTED)
def test_what_cannot_be_used_is_listed_by_kind(tmp_path: Path, name: str) -> None:
    row, kind, reason = LISTED[name]
    listed = read_one(tmp_path, row)
    assert isinstance(listed, dict), listed
    assert (listed["line"], listed["kind"]) == (1, kind) and reason in listed["reason"]


def test_every_kind_is_documented() -> None:
    text = DOCUMENT.read_text()
    assert [kind for kind in Kind if f"| {kind} |" not in text] == []
    assert [name for name in FORMS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("tools", [None, "", "[]", []])
@pytest.mark.parametrize(
    "mask", [{"weight": 1}, {"weight": 1.0, "loss": None}, {"loss": True, "train": True}, {}]
)
def test_masks_and_tools_that_say_nothing_change_nothing(tmp_path: Path, tools: object, mask: dict) -> None:
    plain = read_one(tmp_path, turns("u: Q", "a: A", "u: R", "a: B"))
    assert (
        read_one(tmp_path, turns("u: Q", "a: A", "u: R", "a: B", t1=mask, t3=mask) | {"tools": tools})
        == plain
    )


@pytest.mark.parametrize(
    "mask", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False, "weight": None}]
)
def test_a_masked_turn_is_context_only(tmp_path: Path, mask: dict) -> None:
    row = turns("u: Q", "a: A", "u: R", "a: B", "u: S", "a: C", t1=mask)
    example = read_one(tmp_path, row)
    assert supervised_turns(example.messages, example.response, every_turn=True) == ["B", "C"]
    assert supervised_turns(example.messages, example.response, every_turn=False) == ["C"]
    assert [message["content"] for message in example.messages] == list("QARBS")
    assert example.id != read_one(tmp_path, turns("u: Q", "a: A", "u: R", "a: B", "u: S", "a: C")).id


def test_what_follows_the_last_learned_turn_is_left_off(tmp_path: Path) -> None:
    masked = {"weight": 0}
    row = turns("u: Q", "a: A", "u: R", "a: B", "u: S", "a: C", t3=masked, t5=masked)
    example = read_one(tmp_path, row, every_turn=True)
    assert (example.messages, example.response) == ([{"role": "user", "content": "Q"}], "A")
    listed = read_one(tmp_path, row, every_turn=False)
    assert (listed["kind"], listed["reason"]) == (Kind.MASKED, "the last assistant turn is masked")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    """With a template that would show a mask."""
    path = tmp_path_factory.mktemp("chat")
    (path / "all.jinja").write_text(
        "{% for m in messages %}<|im_start|>{% for key, value in m.items() %}{{ key if key != 'content' "
        "}}{{ value }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>roleassistant{% endif %}"
    )
    return load_chat_format(
        load_tokenizer(make_tokenizer("byte_level", path / "model")), str(path / "all.jinja")
    )


@pytest.mark.parametrize("masked", [(), (1,), (3,), (1, 3)])
def test_labels_are_those_of_the_turns_that_no_mask_leaves_out(
    tmp_path: Path, chat: ChatFormat, masked: tuple
) -> None:
    said = ["u: Q", "a: Ay", "u: R", "a: Bee", "u: S", "a: See"]
    whole = read_one(tmp_path, turns(*said))
    example = read_one(tmp_path, turns(*said, **{f"t{number}": {"weight": 0} for number in masked}))
    expected = [text for number, text in ((1, "Ay"), (3, "Bee"), (5, "See")) if number not in masked]
    encoded = chat.encode_conversation(example.prompt(), example.response, every_turn=True)
    assert np.array_equal(
        encoded.ids, chat.encode_conversation(whole.prompt(), whole.response, every_turn=True).ids
    )
    labels = encoded.ids[encoded.supervised]
    assert chat.tokenizer.joined_bytes(labels[labels != chat.stop_id]).decode() == "".join(expected)
    assert (labels == chat.stop_id).sum() == len(expected)
    assert encoded.spans.ends[-1] == len(response_bytes(expected))
    assert chat.render_prompt(example.prompt()) == chat.render_prompt(whole.prompt())


def test_a_mask_does_not_reach_a_server(tmp_path: Path, chat: ChatFormat) -> None:
    example = read_one(tmp_path, turns("u: Q", "a: A", "u: R", "a: B", t1={"weight": 0}))
    save_model(tmp_path / "model", "llama")
    recipe = small_recipe(
        tmp_path / "run", tmp_path / "rows.jsonl", tmp_path / "model", {"s": tmp_path / "model"}
    )
    served = SourceOptions(
        model=str(tmp_path / "model"), server={"url": "http://localhost:1/v1", "model": "x"}
    )
    body = _Format(recipe.model_copy(update={"sources": {"s": served}}), "s", chat).body(example, 5)
    assert body["messages"] == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]


CONTENT = {"instruction": "Q", "output": "A"}


@pytest.mark.parametrize(
    "ids, kept, kinds",
    [
        (["a", "a"], ["a"], {2: Kind.COPY}),
        ([7, 7.0, "7"], ["7"], {2: Kind.COPY, 3: Kind.COPY}),
        (["a", "b", "a*"], ["b"], {1: Kind.AMBIGUOUS_ID, 3: Kind.AMBIGUOUS_ID}),
        (["a", "a", "a*"], [], {1: Kind.AMBIGUOUS_ID, 2: Kind.AMBIGUOUS_ID, 3: Kind.AMBIGUOUS_ID}),
        ([None, None], ["content"], {2: Kind.COPY}),
        (["a", None], ["a", "content"], {}),
    ],
)
def test_an_id_that_different_rows_have_is_nobodys(
    tmp_path: Path, ids: list, kept: list, kinds: dict
) -> None:
    """Which of the rows another file means is not known: taking one would pair it with another's answers."""
    rows = []
    for name in ids:
        differs = isinstance(name, str) and name.endswith("*")
        row = {"instruction": "Q", "output": "other" if differs else "A"}
        rows.append(row if name is None else row | {"id": name.rstrip("*") if differs else name})
    found = read_rows(write_rows(tmp_path / "rows.jsonl", rows))
    content = read_one(tmp_path, CONTENT).id
    assert list(found.lines) == [content if name == "content" else name for name in kept]
    assert {row["line"]: row["kind"] for row in found.bad} == kinds
    assert [row["line"] for row in found.bad] == sorted(kinds)
    for row in found.bad:
        if row["kind"] == Kind.AMBIGUOUS_ID:
            other = {line for line in kinds if line != row["line"]}
            assert any(f"the id of line {line}," in row["reason"] for line in other), row


def test_ids_of_other_files_are_read_alike(tmp_path: Path) -> None:
    example = read_one(tmp_path, CONTENT | {"id": 3.0})
    assert example.id == id_at({"id": 3.0}, "id", "x") == id_at({"id": 3}, "id", "x") == "3"
    for value in (1.5, float("nan"), float("inf"), 1e20, True, None, ""):
        with pytest.raises(UserError, match="x: id is"):
            id_at({"id": value}, "id", "x")


def test_parquet_rows_with_null_masks_are_read(tmp_path: Path) -> None:
    """In a table every turn has every key, most of them null."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        turns("u: Q", "a: A", "u: R", "a: B", t1={"weight": 0}),
        turns("u: Q", "a: A", t1={"tool_calls": ["x"]}),
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = read_rows(tmp_path / "rows.parquet")
    plain = read_rows(write_rows(tmp_path / "rows.jsonl", rows))
    assert list(found.read()) == list(plain.read()) and found.bad == plain.bad and len(found) == 1
