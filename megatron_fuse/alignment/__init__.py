"""From a source model's rows to the target model's: which row (boundaries), which tokens (vocabulary), how much mass
(projection)."""

from megatron_fuse.alignment.boundaries import UNMATCHED, align_boundaries
from megatron_fuse.alignment.projection import LabelMass, Rows, label_mass, project_rows
from megatron_fuse.alignment.vocabulary import (
    VOCABULARY_MAPS,
    VocabularyMap,
    build_vocabulary_map,
    cached_vocabulary_map,
    load_vocabulary_map,
    save_vocabulary_map,
)

__all__ = [
    "UNMATCHED",
    "VOCABULARY_MAPS",
    "LabelMass",
    "Rows",
    "VocabularyMap",
    "align_boundaries",
    "build_vocabulary_map",
    "cached_vocabulary_map",
    "label_mass",
    "load_vocabulary_map",
    "project_rows",
    "save_vocabulary_map",
]
