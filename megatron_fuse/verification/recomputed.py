"""Compares the arrays of a file with the same arrays, computed again from the data behind them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np


def difference_problems(
    path: Path,
    stored: Mapping[str, np.ndarray],
    recomputed: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    basis: str,
    fix: str,
) -> Iterator[str]:
    """One line for every stored array that is not exactly the recomputed one [n, ...]; NaN equals NaN.

    path: the file of the stored arrays. names [n]: the examples' ids. basis: in words, what the others were
    recomputed from. fix: what the user must do.
    """
    for name, array in recomputed.items():
        stored_array = stored.get(name)
        if stored_array is None or stored_array.shape != array.shape:
            yield f"{path}: {name} is missing, or its shape is not the one that {basis} give. {fix}"
            continue
        differs = ~np.isclose(stored_array, array, rtol=0, atol=0, equal_nan=True).reshape(
            len(array), -1
        ).all(1)
        if differs.any():
            example = int(differs.argmax())
            yield (
                f"{path}: example {names[example]!r}: {name} is {stored_array[example].tolist()}, but "
                f"{basis} give {array[example].tolist()} ({differs.sum():,} examples differ). {fix}"
            )
