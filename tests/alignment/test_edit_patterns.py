"""A string's neighbours at a distance are all that is so far away, and nothing that is farther."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_edit_distance import edit_distance

from megatron_fuse.alignment.edit_patterns import NO_RANK, PatternIndex

TEXTS = st.text("abé🙂\udcc3", max_size=7)


@pytest.mark.parametrize("distance", range(4))
def test_neighbours_are_those_that_comparing_finds(distance):
    @given(st.lists(TEXTS, min_size=1, max_size=25, unique=True), st.lists(TEXTS, min_size=1, max_size=8))
    def law(ranked, texts):
        index = PatternIndex(ranked)
        for length in {len(text) for text in texts}:
            same = [text for text in texts if len(text) == length]
            found = index.neighbours(same, length, distance)
            members = [set() for _ in same]
            for query, group in zip(found.queries, found.groups, strict=True):
                members[query] |= {int(place & NO_RANK) for place in found.places if place >> 31 == group}
            for text, ranks in zip(same, members, strict=True):
                distances = [edit_distance(text, other) for other in ranked]
                exact = {rank for rank, apart in enumerate(distances) if apart == distance}
                assert exact <= ranks <= {rank for rank, apart in enumerate(distances) if apart <= distance}

    law()


@given(st.lists(TEXTS, min_size=1, max_size=25, unique=True), st.data())
def test_ranks_beside_a_place(ranked, data):
    """first_from and last_before are those among all members of all of a query's groups."""
    texts = data.draw(st.lists(st.text("abé", min_size=2, max_size=2), min_size=1, max_size=6))
    ranks = np.array(
        data.draw(st.lists(st.integers(0, len(ranked)), min_size=len(texts), max_size=len(texts)))
    )
    found = PatternIndex(ranked).neighbours(texts, 2, 1)
    first, last = found.first_from(ranks), found.last_before(ranks)
    for query in range(len(texts)):
        groups = set(found.groups[found.queries == query].tolist())
        members = [int(place & NO_RANK) for place in found.places if int(place >> 31) in groups]
        assert first[query] == min((rank for rank in members if rank >= ranks[query]), default=NO_RANK)
        assert last[query] == max((rank for rank in members if rank < ranks[query]), default=-1)
