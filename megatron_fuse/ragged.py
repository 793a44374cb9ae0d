"""Rows of different lengths in one array, row after row, beside an array of their lengths.

Legend: n rows, e values of all rows; counts [n]: values of each row, e = counts.sum().
"""

from collections.abc import Sequence

import numpy as np


def offsets(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n + 1]: row i has the values offsets[i] to offsets[i + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def row_numbers(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [e]: the row of each value."""
    return np.repeat(np.arange(len(counts)), counts)


def split(values: np.ndarray, counts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """The n rows as views of `values` [e, ...]. Raises ValueError if counts do not add up to e."""
    bounds = offsets(counts)
    if bounds[-1] != len(values):
        raise ValueError(f"{len(values)} values in rows of {bounds[-1]} in all")
    return np.split(values, bounds[1:-1]) if len(counts) else []
