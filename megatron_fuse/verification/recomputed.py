"""Arrays that a file holds against the same ones computed anew from what it was made from."""

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
    """A line for every array that is not exactly the wanted one [n, ...]; NaN equals NaN.

    names [n]: the examples' ids; basis: what `wanted` was computed from, in words; fix: what helps.
    """
    for name, want in wanted.items():
        have = found.get(name)
        if have is None or have.shape != want.shape:
            yield f"{path}: {name} is missing or of another shape than {basis} give: {fix}"
            continue
        differs = ~np.isclose(have, want, rtol=0, atol=0, equal_nan=True).reshape(len(want), -1).all(1)
        if differs.any():
            example = int(differs.argmax())
            yield (
                f"{path}: example {names[example]!r}: {name} is {have[example].tolist()}, {basis} give "
                f"{want[example].tolist()} ({differs.sum():,} examples differ): {fix}"
            )
