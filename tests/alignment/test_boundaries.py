"""A target row takes the source row that has read the same bytes, and no other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fuse.alignment import align_boundaries, find_source_rows
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans

quick = settings(max_examples=200, deadline=None, database=None)


@st.composite
def cuts(draw, total: int, stop: bool):
    """Row starts of some tokenization of `total` bytes, tokens in the template's white space included."""
    inner = draw(st.sets(st.integers(1, max(1, total - 1)), max_size=8)) if total > 1 else set()
    white = draw(st.integers(0, 2))
    return np.array([0] * (white + (total > 0)) + sorted(inner) + [total] * stop, dtype=np.int32)


def spans(text: str) -> TokenSpans:
    """ "0-4 4-6? 6-7$" is a token of bytes 0 to 4, a lossy one of 4 to 6, a stop token."""
    bounds = [row.rstrip("?$").split("-") for row in text.split()]
    flags = [{"?": SpanFlag.LOSSY, "$": SpanFlag.STOP}.get(row[-1], 0) for row in text.split()]
    starts, ends = np.array(bounds, np.int64).reshape(-1, 2).T
    return TokenSpans(np.zeros(len(starts), np.int32), starts, ends, np.array(flags, np.uint8))


@quick
@given(st.integers(0, 12).flatmap(lambda n: st.tuples(cuts(n, True), cuts(n, True))))
def test_matches_exactly_where_prefixes_are_equal(pair):
    source, target = pair
    rows = align_boundaries(source, target)
    assert rows.dtype == np.int32 and rows.shape == target.shape
    for row, start in zip(rows, target, strict=True):
        assert (row >= 0) == (start in source)
        if row >= 0:
            assert source[row] == start
    matched = rows[rows >= 0]
    assert np.all(np.diff(matched) >= 0)  # text is read forward
    # Both stop rows start at the end, and the last row pairs with the last.
    assert rows[-1] == len(source) - 1


@quick
@given(st.integers(0, 12).flatmap(lambda n: st.tuples(cuts(n, True), cuts(n, True))))
def test_equal_tokenizations_pair_row_by_row_and_matching_is_mutual(pair):
    source, target = pair
    assert align_boundaries(target, target).tolist() == list(range(len(target)))
    forth, back = align_boundaries(source, target) >= 0, align_boundaries(target, source) >= 0
    assert set(target[forth]) == set(source[back])


@pytest.mark.parametrize(
    ("source", "target", "rows"),
    [
        ([0, 4, 6, 9], [0, 6, 9], [0, 2, 3]),  # the target's tokens are longer
        ([0, 6, 9], [0, 4, 6, 9], [0, -1, 1, 2]),  # a start inside a source token
        ([0, 4, 6], [0, 6, 9], [0, 2, -1]),  # the source was cut off: it has no stop row
        ([0, 4, 9], [0, 4], [0, 1]),  # the target was cut off: its last row is a token's
        # `▁` `1` `2` of the target against `12`: both take the first row.
        ([0, 2], [0, 0, 1, 2], [0, 0, -1, 1]),
        ([0, 0, 1, 2], [0, 2], [1, 3]),  # the other way: the row that has read the white space
        ([0, 0, 1, 2], [0, 0, 1, 2], [0, 1, 2, 3]),
        ([0, 0, 0, 3], [0, 0, 3], [1, 2, 3]),
        ([0], [0], [0]),  # empty responses: only stop rows
        ([0], [], []),
        ([], [0, 3], [-1, -1]),
    ],
)
def test_cases(source, target, rows):
    assert align_boundaries(np.array(source, np.int32), np.array(target, np.int32)).tolist() == rows


@pytest.mark.parametrize(
    ("source", "target", "rows", "inside"),
    [
        ("0-6 6-9 9-10$", "0-4 4-6 6-9 9-10$", [0, 0, 1, 2], [0, 1, 0, 0]),
        ("0-0 0-2 2-3$", "0-1 1-2 2-3$", [1, 1, 2], [0, 1, 0]),  # `▁` `12` against `1` `2`
        ("0-2 2-3$", "0-0 0-1 1-2 2-3$", [0, 0, 0, 1], [0, 0, 1, 0]),  # `12` against `▁` `1` `2`
        # Two turns.
        ("0-2 2-3$ 3-6 6-7$", "0-1 1-2 2-3$ 3-4 4-6 6-7$", [0, 0, 1, 2, 2, 3], [0, 1, 0, 0, 1, 0]),
        ("0-2 3-6 6-7$", "0-1 1-2 2-3$ 3-6 6-7$", [0, 0, -1, 1, 2], [0, 1, 0, 0, 0]),  # no stop row to take
        ("3-6 6-7$", "0-1 1-2 2-3$ 3-6 6-7$", [-1, -1, -1, 0, 1], [0] * 5),  # the source lacks the first turn
        ("0-2 2-3$", "0-1 1-2 2-3$ 3-5 5-6$", [0, 0, 1, -1, -1], [0, 1, 0, 0, 0]),  # and the second
        # Only the lossy row is lost.
        ("0-2 2-4? 4-6 6-7$", "0-2 2-3 3-4 4-6 6-7$", [0, -1, -1, 2, 3], [0] * 5),
        ("0-2 2-4 4-6 6-7$", "0-2 2-3? 3-4 4-6? 6-7$", [0, -1, 1, -1, 3], [0, 0, 1, 0, 0]),
        ("0-2? 2-2? 2-3$", "0-2 2-3$", [-1, 2], [0, 0]),  # the stop row follows a lossy end
        ("0-2 2-2? 3-4 4-5$", "0-2 2-3$ 3-4 4-5$", [0, -1, 2, 3], [0] * 4),  # which no stop row may take
        ("0-2 2-3$", "", [], []),
    ],
)
def test_rows_of_spans(source, target, rows, inside):
    found = find_source_rows(spans(source), spans(target))
    assert [array.tolist() for array in found] == [rows, list(map(bool, inside))]
    assert [array.dtype for array in found] == [np.int32, bool]


def test_refuses_what_is_no_list_of_starts():
    with pytest.raises(ValueError, match="target_starts decreases at row 2"):
        align_boundaries(np.array([0, 1]), np.array([0, 3, 2]))
