"""Compares the arrays of a file with the same arrays, computed again from the data behind them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np


def difference_problems(
    path: Path,
    found: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    basis: str,
    fix: str,
) -> Iterator[str]:
    """One line for every array of `found` that is not exactly the wanted one [n, ...]; NaN equals NaN.

    path: the file of `found`. names [n]: the examples' ids. basis: in words, what `wanted` was computed from.
    fix: what the user must do.
    """
    for name, want in wanted.items():
        have = found.get(name)
        if have is None or have.shape != want.shape:
            yield f"{path}: {name} is missing, or its shape is not the one that {basis} give. {fix}"
            continue
        differs = ~np.isclose(have, want, rtol=0, atol=0, equal_nan=True).reshape(len(want), -1).all(1)
        if differs.any():
            example = int(differs.argmax())
            yield (
                f"{path}: example {names[example]!r}: {name} is {have[example].tolist()}, but {basis} give "
                f"{want[example].tolist()} ({differs.sum():,} examples differ). {fix}"
            )
