"""Whether two fusion datasets differ by rounding alone."""

from dataclasses import dataclass

import numpy as np

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.fusion_data.documents import Document

# Log-probabilities are stored in half precision: two that are equal up to rounding may be stored as
# neighbours, which lie 2**-10 of the value apart.
HALF = 2**-10


@dataclass
class Compared:
    rows: int = 0
    at_the_cut: int = 0  # rows of which only the smallest entries differ


def compare_fusion_data(
    found: FusionDataset,
    expected: FusionDataset,
    mode: str,
    source: str,
    *,
    relative: float = HALF,
    absolute: float = 1e-4,
) -> Compared:
    """Compares the rows of a source over all examples.

    Everything but log-probabilities is equal, and these are equal within the tolerances. Rounding may also
    decide which of two entries is the smallest one that is kept.
    """
    compared = Compared()
    np.testing.assert_array_equal(found.winners(mode), expected.winners(mode))
    for example in range(len(found.example_ids)):
        one, two = (each.document(mode, example, source) for each in (found, expected))
        for name in ("tokens", "supervised", "match"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
        np.testing.assert_array_equal(one.counts > 0, two.counts > 0)
        for ours, theirs in zip(_rows(one), _rows(two), strict=True):
            compared.rows += 1
            shared = ours.keys() & theirs.keys()
            np.testing.assert_allclose(
                [ours[token] for token in shared],
                [theirs[token] for token in shared],
                rtol=relative,
                atol=absolute,
            )
            if ours.keys() != theirs.keys():
                compared.at_the_cut += 1
                least = min(ours[token] for token in shared)
                most = least + absolute + HALF * abs(least)
                for row in (ours, theirs):
                    assert all(row[token] <= most for token in row.keys() - shared)
    return compared


def _rows(document: Document) -> list[dict[int, float]]:
    """The entries of each row that has any: token -> log-probability."""
    ends = document.counts[document.counts > 0].cumsum()
    ids = np.split(document.teacher_ids, ends[:-1])
    logprobs = np.split(document.teacher_logprobs.astype(np.float64), ends[:-1])
    return [
        dict(zip(of_row.tolist(), values.tolist(), strict=True))
        for of_row, values in zip(ids, logprobs, strict=True)
        if len(of_row)
    ]
