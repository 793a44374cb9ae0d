"""Instructions from JSONL, Parquet and saved data sets; a damaged file is named."""

import json
from pathlib import Path

import pytest
from small_instructions import recipe_for
from small_models import write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import INSTRUCTIONS, prepare_instructions, read_rows
from megatron_fuse.stages import Context


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
