"""Laws of reading JSON files: the form of a file does not change its rows, and a broken one is named with
its place.
"""

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import read_rows
from megatron_fuse.instructions.json_values import JsonError, array_elements
from megatron_fuse.instructions.tables import read_table

ROWS = [
    {
        "id": n,
        "messages": [
            {"role": "user", "content": f'[{{\\" {n}\n'},
            {"role": "assistant", "content": "été 🙂"},
        ],
    }
    for n in range(5)
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ARRAYS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5)
# 1: every place is the end of a chunk; 7: some are; 10**6: none is
CHUNKS = st.sampled_from([1, 2, 7, 64, 10**6])


@given(rows=ARRAYS, chunk=CHUNKS, indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans())
def test_an_array_is_read_as_json_loads_reads_it(
    rows: list, chunk: int, indent: int | None, ascii_only: bool
) -> None:
    text = f" {json.dumps(rows, indent=indent, ensure_ascii=ascii_only)}\n"
    assert list(array_elements(io.StringIO(text), chunk)) == json.loads(text)


@given(rows=ARRAYS, chunk=CHUNKS, data=st.data())
def test_a_part_of_an_array_is_no_array(rows: list, chunk: int, data: st.DataObject) -> None:
    text = json.dumps(rows)
    end = data.draw(st.integers(0, len(text) - 1))
    read = []
    with pytest.raises(JsonError):
        read.extend(array_elements(io.StringIO(text[:end]), chunk))


@given(text=st.text(alphabet='[]{},:"1 \\nu-tr', max_size=20), chunk=CHUNKS)
def test_what_json_loads_refuses_is_refused(text: str, chunk: int) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = list(array_elements(io.StringIO(text), chunk))
    except JsonError:
        found = None
    is_array = isinstance(expected, list) and all(isinstance(element, dict) for element in expected)
    assert found == (expected if is_array else None)


def test_an_array_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write(
            "["
            + ",".join(json.dumps({"instruction": f"{n} " * 500, "output": "A"}) for n in range(20_000))
            + "]"
        )
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_table(path)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20 < path.stat().st_size / 3, peak  # a few chunks of 1 Mi characters


def columns(rows: list[dict]) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def by_index(rows: list[dict]) -> dict[str, dict[str, Any]]:
    return {key: {str(n): value for n, value in enumerate(column)} for key, column in columns(rows).items()}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TEXTS = {
    "rows.jsonl": lines(ROWS),
    "lines.json": lines(ROWS),
    "array.json": json.dumps(ROWS),
    "array.jsonl": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "columns.json": json.dumps(columns(ROWS)),
    "indented_columns.json": "\n" + json.dumps(columns(ROWS), indent=1),
    "pandas.json": json.dumps(by_index(ROWS)),
    "with_a_mark.json": "\ufeff" + json.dumps(ROWS),
    "lines_with_a_mark.jsonl": "\ufeff" + lines(ROWS),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_of_a_file_gives_the_same_rows(tmp_path: Path, name: str, packed: bool) -> None:
    data = TEXTS[name].encode()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert list(read_table(path)) == list(enumerate(ROWS, 1))
    assert [example.id for example in read_rows(path).read()] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("form", [columns, by_index])
def test_a_single_conversation_is_a_row_and_no_columns(tmp_path: Path, form: object) -> None:
    row = {"messages": ROWS[0]["messages"]}
    for name in ("one.json", "one.jsonl"):
        (tmp_path / name).write_text(json.dumps(row))
        assert list(read_table(tmp_path / name)) == [(1, row)]
    (tmp_path / "columns.jsonl").write_text(json.dumps(form(ROWS)))  # type: ignore[operator]
    assert len(list(read_table(tmp_path / "columns.jsonl"))) == 1, "a line of JSONL is a row"


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("blank", ["\n", "\r\n", " \n\n"])
def test_blank_lines_may_follow_a_byte_order_mark(tmp_path: Path, name: str, blank: str) -> None:
    (tmp_path / name).write_text(f"\ufeff{blank}{lines(ROWS)}", newline="")
    first = 1 + blank.count("\n")
    assert list(read_table(tmp_path / name)) == list(enumerate(ROWS, first))


TURNS = ROWS[0]["messages"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "tools": []},
        {"messages": TURNS, "tags": ["a", "b"]},  # as many as there are turns
        {"tags": ["a"], "conversations": [{"from": "human", "value": "Q"}]},
        {"messages": TURNS, "id": 3},
        {"instruction": "Q", "output": "A"},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_with_turns_or_with_no_columns_is_a_row(
    tmp_path: Path, row: dict, indent: int | None
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(row, indent=indent))
    assert list(read_table(tmp_path / "x.json")) == [(1, row)]


BROKEN = {
    "no object": ('[{"a": 1},\n 5]', r"x\.json:2: element 2 is not valid JSON .*an object is missing"),
    "cut off": ('[{"a": 1},\n\n{"a": "x', r"x\.json:3: element 2 is not valid JSON .*Unterminated string"),
    "no bracket": ('[{"a": 1}', r"x\.json:1: element 2 is not valid JSON .*closing bracket is missing"),
    "comma at the end": ('[{"a": 1},\n]', r"x\.json:2: element 2 is not valid JSON"),
    "two arrays": ("[]\n[]", r"x\.json:2: .*more text after the array"),
    "an error far from the end": (
        '[{"a" 1},' + " " * 99 + "{}]",
        r"x\.json:1: element 1 is not valid JSON .*':'",
    ),
    "deep": ("[" + '{"a":' * 100_000, r"x\.json:1: element 1 is not valid JSON"),
    "digits": ('[{"a": ' + "1" * 9999 + "}]", r"x\.json:1: element 1 is not valid JSON"),
    "no UTF-8": (b'[{"a": "\xff"}]', r"x\.json: not UTF-8 after 0 elements"),
    "columns of two lengths": (
        '{"a": [1, 2], "b": [1]}',
        r"x\.json: the columns of the object have different lengths \(a 2, b 1\)",
    ),
    "half a line": ('{"a": 1}\n{"a":', r"x\.json:2: not valid JSON"),
    "gzip cut off": (gzip.compress(b'{"a": 1}\n' * 999)[:-9], r"x\.json: cannot be unpacked"),
    "no gzip": (b"\x1f\x8bnothing", r"x\.json: cannot be unpacked"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_its_place(tmp_path: Path, kind: str) -> None:
    data, message = BROKEN[kind]
    path = tmp_path / "x.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError, match=message):
        list(read_table(path))
