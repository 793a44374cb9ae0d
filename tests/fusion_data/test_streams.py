"""Laws of the stored streams: Megatron's own form, nothing lost, damage found, probabilities never rounded
up.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.documents import ROW_FIELDS, TEXT_FIELDS, DocumentStreams, round_down_to_half
from megatron_fuse.fusion_data.streams import Stream, write_stream


# empty sequences at the ends and between; nothing but empty ones; none at all
@pytest.mark.parametrize("lengths", [[0, 3, 0, 0, 5, 1, 0], [0, 0], []])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_streams_are_megatrons_and_give_back_what_was_written(
    tmp_path: Path, lengths: list[int], dtype: type
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    top = min(np.iinfo(dtype).max, 2**30)
    values = np.random.default_rng(7).integers(0, top, sum(lengths), endpoint=True).astype(dtype)
    write_stream(tmp_path / "one.field", values, lengths)
    write_stream(tmp_path / "two.field", values[::-1].copy(), lengths[::-1])
    stream = Stream([tmp_path / "one.field", tmp_path / "two.field"])
    theirs = IndexedDataset(str(tmp_path / "one.field"))
    assert len(theirs) == len(lengths)
    assert len(stream) == 2 * len(lengths)
    assert stream.lengths.tolist() == lengths + lengths[::-1]
    parts = np.split(values, np.cumsum(lengths)[:-1]) if lengths else []
    backwards = np.split(values[::-1], np.cumsum(lengths[::-1])[:-1]) if lengths else []
    for index, expected in enumerate([*parts, *backwards]):
        assert stream[index].tolist() == expected.tolist()
        assert stream[index].dtype == dtype
    for index, expected in enumerate(parts):
        assert theirs[index].tolist() == expected.tolist()
        assert theirs.get(index).dtype == dtype
    assert stream.values().tolist() == [*values.tolist(), *values[::-1].tolist()]
    assert Stream([tmp_path / "one.field"]).values().tolist() == values.tolist()
    for outside in (-1, 2 * len(lengths)):
        with pytest.raises(IndexError):
            stream[outside]
    if sum(lengths):
        with pytest.raises(ValueError, match="read-only"):
            stream[lengths.index(3)][0] = 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_shard_is_mapped_when_it_is_read_and_holds_no_file_descriptor(tmp_path: Path) -> None:
    prefixes = [tmp_path / f"shard-{number:05d}.tokens" for number in range(40)]
    for number, prefix in enumerate(prefixes):
        write_stream(prefix, np.full(3, number, np.uint16), [1, 2])

    def mapped() -> set[str]:
        return {
            line.split()[-1]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if str(tmp_path) in line
        }

    before = len(list(Path("/proc/self/fd").iterdir()))
    stream = Stream(prefixes)
    assert mapped() == set()
    values = stream[7]
    assert values.tolist() == [3, 3] and mapped() == {f"{prefixes[3]}.bin"}
    assert [stream[2 * number].item() for number in range(40)] == list(range(40))
    assert len(mapped()) == 40
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_damaged_streams_are_refused_by_name(tmp_path: Path) -> None:
    prefix = tmp_path / "shard-00000.tokens"
    write_stream(prefix, np.arange(9, dtype=np.int32), [4, 5])
    index, values = (Path(f"{prefix}.{suffix}") for suffix in ("idx", "bin"))
    whole_index, whole_values = index.read_bytes(), values.read_bytes()
    values.write_bytes(whole_values[:-1])
    with pytest.raises(UserError, match=r"tokens.bin: the file has 35 bytes, but its index describes 36"):
        Stream([prefix])
    values.write_bytes(whole_values)
    for damaged in (whole_index[:-1], whole_index[:5], b"", b"X" + whole_index[1:], whole_index + b"\0"):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match=r"tokens.idx: not a complete index"):
            Stream([prefix])
    lengths = np.frombuffer(whole_index, np.int32, 2, 34)
    index.write_bytes(whole_index.replace(lengths.tobytes(), np.array([-4, 13], np.int32).tobytes(), 1))
    with pytest.raises(UserError, match=r"tokens.idx: a length is below 0"):
        Stream([prefix])
    index.unlink()
    with pytest.raises(UserError, match=r"tokens.idx: missing"):
        Stream([prefix])


def small_documents() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Values and lengths of every field of three examples of 5, 0 and 4 tokens, with 2, 0 and 3 labels."""
    return {
        "tokens": (np.arange(9, dtype=np.uint16), [5, 0, 4]),
        "supervised": (np.array([0, 0, 1, 0, 1, 0, 1, 1, 1], np.uint8), [5, 0, 4]),
        "counts": (np.array([2, 0, 1, 3, 1], np.uint8), [2, 0, 3]),
        "match": (np.array([1, 0, 1, 1, 1], np.uint8), [2, 0, 3]),
        "entry_ids": (np.arange(7, dtype=np.uint16), [2, 0, 5]),
        "entry_logprobs": (np.linspace(-3, 0, 7).astype(np.float16).view(np.uint16), [2, 0, 5]),
    }


def open_documents(
    directory: Path, fields: dict[str, tuple[np.ndarray, list[int]]], **facts: Any
) -> DocumentStreams:
    for field, (values, lengths) in fields.items():
        write_stream(directory / field, values, lengths)
    text, rows = ({field: Stream([directory / field]) for field in of} for of in (TEXT_FIELDS, ROW_FIELDS))
    return DocumentStreams(directory, text, rows, **{"examples": 3, "entries_per_row": 3} | facts)


def test_documents_are_views_of_the_files(tmp_path: Path) -> None:
    fields = small_documents()
    streams = open_documents(tmp_path, fields, supervised_tokens=np.array([2, 0, 3]))
    assert streams.lengths.tolist() == [5, 0, 4] and streams.supervised_tokens.tolist() == [2, 0, 3]
    for field, (values, lengths) in fields.items():
        parts = np.split(values, np.cumsum(lengths)[:-1])
        for document, part in zip((streams[i] for i in range(3)), parts, strict=True):
            found = getattr(document, field.replace("entry", "teacher"))  # named so in memory
            assert found.view(part.dtype).tolist() == part.tolist()
            assert not found.flags.owndata and not found.flags.writeable
    assert streams[2].teacher_logprobs.dtype == np.float16 and streams[2].supervised.dtype == bool


# 5, 0 and 4 tokens; 2, 0 and 3 rows; 2, 0 and 5 entries, of which one field says something else
@pytest.mark.parametrize(
    ("field", "lengths", "message"),
    [
        ("supervised", [5, 1, 3], "example 1 has not one supervision mark per token"),
        ("counts", [2, 1, 2], "example 1 has not one row per supervised token"),
        ("match", [2, 1, 2], "example 1 has not one match per row"),
        ("entry_ids", [2, 1, 4], "example 1 has not at most 3 entries per row"),
        ("entry_logprobs", [3, 0, 4], "example 0 has not one log-probability per entry"),
        ("tokens", [5, 0, 4, 0], "tokens has 4 examples, but the text has 3"),
    ],
)
def test_streams_that_contradict_each_other_are_refused_when_opened(
    tmp_path: Path, field: str, lengths: list[int], message: str
) -> None:
    fields = small_documents()
    fields[field] = (fields[field][0], lengths)
    with pytest.raises(UserError, match=message):
        open_documents(tmp_path, fields, supervised_tokens=np.array([2, 0, 3]))


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("counts", 3, 2, "example 2 has 5 entries, but the counts of its rows add up to 4"),
        ("supervised", 3, 1, "example 0 has 3 labels instead of 2"),
        ("supervised", slice(5, 7), [1, 0], "example 2 has a label at its first token"),
    ],
)
def test_a_document_whose_parts_do_not_fit_is_refused_when_read(
    tmp_path: Path, field: str, place: int | slice, value: int | list[int], message: str
) -> None:
    fields = small_documents()
    fields[field][0][place] = value
    streams = open_documents(tmp_path, fields)
    with pytest.raises(UserError, match=message):
        [streams[example] for example in range(3)]


def test_half_precision_rounds_down_to_the_next_number() -> None:
    seed = 13
    random = np.random.default_rng(seed)
    values = np.concatenate(
        [-np.exp(random.uniform(-20, 12, 20_000)), [0, -0.0, -1e-9, -1e9, -1, -2.5, 1e-7]]
    )
    values = values.astype(np.float32)
    half = round_down_to_half(values)
    found = half.astype(np.float32)
    assert np.isfinite(found).all()
    inside = (values >= -65504) & (values <= 0)
    assert (found[inside] <= values[inside]).all(), f"seed {seed}"
    with np.errstate(under="ignore"):
        above = np.nextafter(half, np.float16(np.inf)).astype(np.float32)
    assert (above[inside] > values[inside]).all(), f"seed {seed}: not the nearest below"
    assert (np.exp(values.clip(max=0)) - np.exp(found)).max() < 4e-4
