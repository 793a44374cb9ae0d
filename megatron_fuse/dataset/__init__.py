"""The training dataset: built from captures, read example by example, collated and packed into batches."""

from megatron_fuse.dataset.build import build_fusion_data
from megatron_fuse.dataset.reader import FusionDataset, data_parents

__all__ = ["FusionDataset", "build_fusion_data", "data_parents"]
