"""Offsets, row numbers and parts of ragged arrays agree with each other, also for empty rows and no rows."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_fuse import ragged

COUNTS = {
    "no rows": np.zeros(0, np.int64),
    "one empty row": np.zeros(1, np.uint8),
    "empty rows anywhere": np.array([0, 3, 0, 0, 255, 1, 0], np.uint8),
    "sums beyond the dtype of the counts": np.full(1000, 255, np.uint8),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("width", [(), (2,)], ids=["values", "pairs"])
def test_rows_are_what_the_offsets_say(counts: np.ndarray, width: tuple[int, ...]) -> None:
    total = sum(counts.tolist())
    values = np.random.default_rng(0).integers(0, 9, (total, *width))
    offsets, rows, numbers = ragged.offsets(counts), ragged.split(values, counts), ragged.row_numbers(counts)
    assert offsets.dtype == numbers.dtype == np.int64
    assert np.diff(offsets).tolist() == counts.tolist() and (offsets[0], offsets[-1]) == (0, total)
    assert [row.tolist() for row in rows] == [values[begin:end].tolist() for begin, end in pairwise(offsets)]
    assert [row.tolist() for row in rows] == [values[numbers == row].tolist() for row in range(len(counts))]
    assert all(np.shares_memory(row, values) for row in rows if len(row))


def test_lists_are_counts_too() -> None:
    assert ragged.offsets([2, 0, 1]).tolist() == [0, 2, 2, 3]
    assert ragged.row_numbers([2, 0, 1]).tolist() == [0, 0, 2]


def test_counts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values in rows of 2 in all"):
        ragged.split(np.arange(3), [1, 1])
