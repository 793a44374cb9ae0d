"""Reads a user's rows one at a time, from JSON, Parquet, or a directory that `datasets` saved.

`key` is the recipe's key that names the table, for errors.

FILE.parquet, DIRECTORY/*.parquet    one table; several files are read in the order of their names
DIRECTORY/state.json                 of `Dataset.save_to_disk`: it names Arrow files in the streaming format
any other file                       JSONL, a JSON array or JSON columns (json_files.py), also with gzip
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from megatron_fuse.errors import UserError
from megatron_fuse.instructions.json_files import read_json_rows
from megatron_fuse.storage import read_json, sha256_of_file, sha256_of_json
from megatron_fuse.storage.records import FileName, Record, parse_record
from megatron_fuse.text_safety import brief

_BATCH = 64  # Parquet rows that are decoded together


class _DataFile(Record):
    filename: FileName


class _SavedDataset(Record):
    """state.json of `Dataset.save_to_disk`."""

    data_files: list[_DataFile] = Field(alias="_data_files", min_length=1)


class _SavedSplits(Record):
    """dataset_dict.json of `DatasetDict.save_to_disk`."""

    splits: list[str]


_Saved = TypeVar("_Saved", bound=Record)


def _saved(path: Path, form: type[_Saved]) -> _Saved:
    return parse_record(read_json(path), form, str(path), "Save the data set again.")


def table_sha256(path: Path, key: str = "data.path") -> str:
    """The hash of all rows as they are stored. Raises UserError if there is no such table."""
    files = _files(path, key)
    return (
        sha256_of_file(path) if files == [path] else sha256_of_json([sha256_of_file(file) for file in files])
    )


def table_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path, "data.path"))


def read_table(path: Path, key: str = "data.path") -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row): in JSONL the number of the line, else of the row. Both count from 1.

    Raises UserError if the table cannot be read.
    """
    files = _files(path, key)
    if files == [path] and path.suffix != ".parquet":
        yield from read_json_rows(path)
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{key}: reading {path} needs pyarrow. Run pip install pyarrow, or convert the file to JSONL."
        ) from error
    number = 0
    for file in files:
        try:
            if file.suffix == ".parquet":
                batches = pyarrow.parquet.ParquetFile(file, memory_map=True).iter_batches(batch_size=_BATCH)
            else:
                batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
            for batch in batches:
                # Arrow believes the file's offsets: reading by false ones kills the process.
                batch.validate(full=True)
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield number, row
        # KeyError: a key twice in one map; ValueError, OverflowError: a date or text that Python has no form
        # for
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
            raise UserError(
                f"{file}: cannot be read after {number} rows ({brief(str(error))}). Write the file again."
            ) from error


def _files(path: Path, key: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{key}: {path} does not exist")
    if (path / "state.json").is_file():
        state = _saved(path / "state.json", _SavedDataset)
        files = [path / entry.filename for entry in state.data_files]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{path}/state.json: _data_files: the file {brief(missing[0])} is missing. Save the data "
                "set again."
            )
        return files
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(_saved(path / "dataset_dict.json", _SavedSplits).splits)
        raise UserError(
            f"{key}: {path} holds several splits. Name the directory of one of them ({brief(splits)})."
        )
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise UserError(
            f"{key}: {path} has no *.parquet file and no state.json, which `datasets` writes. Name the "
            "directory of a data set."
        )
    return files
