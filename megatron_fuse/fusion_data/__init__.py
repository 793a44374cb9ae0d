"""Fusion data: teachers' rows in the target's tokens, aligned once and chosen between freely."""

from megatron_fuse.alignment import MATCHES
from megatron_fuse.fusion_data.build import build_fusion_data
from megatron_fuse.fusion_data.reader import Document, FusionDataset

__all__ = ["MATCHES", "Document", "FusionDataset", "build_fusion_data"]
