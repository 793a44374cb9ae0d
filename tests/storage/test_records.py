"""Typed content of our own files: what is of another form is refused by file and key, what is unknown is
kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_fuse.errors import UserError
from megatron_fuse.storage.records import ManifestRecord, MarkerRecord, read_record, read_typed_rows

FACTS = {"bytes": 3, "sha256": "0" * 64}
MANIFEST: dict[str, Any] = {
    "format_version": 2,
    "stage": "scores",
    "options": {"seed": 1, "top_p": 0.95, "list": [1, None]},
    "inputs": {"model": "abc"},
    "shards": 1,
    "counts": {"examples": 3},
    "files": {"shard-00000.npy": FACTS},
}


def test_a_manifest_comes_back_as_it_is_in_the_file(tmp_path: Path) -> None:
    content = MANIFEST | {"later": {"key": 1.5}, "files": {"a.npy": FACTS | {"note": "x"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert read_record(tmp_path / "manifest.json", ManifestRecord).content() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": None}, "files: must be a valid dictionary, not None"),
        ({"files": {"a.npy": 5}}, "files.a.npy: .*not 5"),
        ({"files": {"a.npy": {"bytes": 3}}}, "files.a.npy.sha256: missing"),
        (
            {"files": {"a.npy": FACTS | {"bytes": True}}},
            "files.a.npy.bytes: must be a valid integer, not True",
        ),
        ({"files": {"a.npy": FACTS | {"bytes": -1}}}, "files.a.npy.bytes: .*not -1"),
        ({"files": {"a.npy": FACTS | {"sha256": "x\0\x1b"}}}, r"files.a.npy.sha256: .*not 'x\\x00\\x1b'"),
        ({"files": {"../a.npy": FACTS}}, "files.../a.npy: must be the name of a file in this directory"),
        ({"files": {"/etc/passwd": FACTS}}, "must be the name of a file"),
        ({"counts": {"examples": 1.0}}, "counts.examples: must be a valid integer, not 1.0"),
        ({"counts": {"examples": float("nan")}}, "counts.examples"),
        ({"counts": {"examples": -3}}, "counts.examples"),
        ({"shards": "1"}, "shards: must be a valid integer, not '1'"),
        ({"inputs": {"model": ["x" * 1000]}}, "inputs.model: must be a valid string"),
        ({"stage": None, "shards": None}, r"stage: .*\(and 1 more\)"),
    ],
)
def test_a_damaged_manifest_is_refused_by_its_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(MANIFEST | changes))
    with pytest.raises(UserError, match=f"{path}: .*{message}") as caught:
        read_record(path, ManifestRecord)
    assert len(str(caught.value)) - 2 * len(str(tmp_path)) < 400


@pytest.mark.parametrize("key", ["files", "counts"])
def test_a_marker_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "shard-00000.done"
    path.write_text(
        json.dumps(
            {name: value for name, value in MANIFEST.items() if name in ("files", "counts")}
            | {"together": ["a"]}
        )
    )
    assert read_record(path, MarkerRecord).together == ["a"]
    path.write_text(json.dumps({name: {} for name in ("files", "counts") if name != key}))
    with pytest.raises(UserError, match=f"{path}: {key}: missing"):
        read_record(path, MarkerRecord)


@pytest.mark.parametrize("sealed", [True, False])
def test_half_a_character_in_a_record_is_refused(tmp_path: Path, sealed: bool) -> None:
    """The sha256 of such a text cannot be computed."""
    path = tmp_path / "manifest.json"
    seal = {"sha256": "0" * 64} if sealed else {}
    path.write_text(json.dumps(MANIFEST | {"options": {"key": "\ud800"}} | seal))
    with pytest.raises(UserError, match=f"{path}: it holds half a surrogate pair"):
        read_record(path, ManifestRecord)


@dataclass(frozen=True)
class Row:
    name: str
    count: int
    flag: bool = False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"name": "b"}', "count: missing"),
        ('{"name": "b", "count": 1.0}', "count: "),
        ('{"name": "b", "count": true}', "count: "),
        ('{"name": "b", "count": 1, "flag": 1}', "flag: "),
        ('{"name": "\\ud800", "count": 1}', "Invalid JSON"),
        ("[1]", "must be an object"),
        ("[" * 100_000, "Invalid JSON"),
        ("{", "Invalid JSON"),
    ],
)
def test_typed_rows_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a", "count": 1, "flag": true}\n\n' + line + "\n")
    rows = read_typed_rows(path, Row)
    assert next(rows) == Row("a", 1, True)
    with pytest.raises(UserError, match=f"{path}:3: .*{message}"):
        next(rows)
