"""Laws of the stored streams: Megatron's own form, nothing lost, damage found, probabilities never rounded up."""

from pathlib import Path

import numpy as np
import pytest

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.streams import Stream, write_stream
from megatron_fuse.fusion_data.teachers import round_down_to_half


# empty sequences at the ends and between; nothing but empty ones; none at all
@pytest.mark.parametrize("lengths", [[0, 3, 0, 0, 5, 1, 0], [0, 0], []])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_streams_are_megatrons_and_give_back_what_was_written(tmp_path: Path, lengths: list[int], dtype: type) -> None:
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
    if sum(lengths):
        with pytest.raises(ValueError, match="read-only"):
            stream[lengths.index(3)][0] = 1


def test_damaged_streams_are_refused_by_name(tmp_path: Path) -> None:
    prefix = tmp_path / "shard-00000.tokens"
    write_stream(prefix, np.arange(9, dtype=np.int32), [4, 5])
    index, values = (Path(f"{prefix}.{suffix}") for suffix in ("idx", "bin"))
    whole_index, whole_values = index.read_bytes(), values.read_bytes()
    values.write_bytes(whole_values[:-1])
    with pytest.raises(UserError, match=r"tokens.bin: 35 bytes, but its index describes 36"):
        Stream([prefix])
    values.write_bytes(whole_values)
    for damaged in (whole_index[:-1], whole_index[:5], b"", b"X" + whole_index[1:], whole_index + b"\0"):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match=r"tokens.idx: not a whole index"):
            Stream([prefix])
    index.unlink()
    with pytest.raises(UserError, match=r"tokens.idx: missing"):
        Stream([prefix])


def test_half_precision_rounds_down_to_the_next_number() -> None:
    seed = 13
    random = np.random.default_rng(seed)
    values = np.concatenate([-np.exp(random.uniform(-20, 12, 20_000)), [0, -0.0, -1e-9, -1e9, -1, -2.5, 1e-7]])
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
