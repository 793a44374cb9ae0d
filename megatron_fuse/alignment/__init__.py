"""Rewrites the rows of a source model as rows over the target's vocabulary.

`boundaries` finds the source row for each target row, and `vocabulary` the target token for each source
token. `conditioning` and `label_mass` compute how much mass each token gets. `projection` does all of this
for a whole shard at once.
"""

from megatron_fuse.alignment.boundaries import align_boundaries, find_source_rows
from megatron_fuse.alignment.projection import MATCHES, UNMATCHED, project_responses
from megatron_fuse.alignment.rows import Rows, SourceRows
from megatron_fuse.alignment.statistics import PairCounts, count_pairs
from megatron_fuse.alignment.vocabulary import (
    VOCABULARY_MAPS,
    VocabularyMap,
    build_vocabulary_map,
    cached_vocabulary_map,
    load_vocabulary_map,
    save_vocabulary_map,
)

__all__ = [
    "MATCHES",
    "UNMATCHED",
    "VOCABULARY_MAPS",
    "PairCounts",
    "Rows",
    "SourceRows",
    "VocabularyMap",
    "align_boundaries",
    "build_vocabulary_map",
    "cached_vocabulary_map",
    "count_pairs",
    "find_source_rows",
    "load_vocabulary_map",
    "project_responses",
    "save_vocabulary_map",
]
