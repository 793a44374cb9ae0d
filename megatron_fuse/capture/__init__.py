"""Capture: the sparse next-token distributions of a source over a response, in its own vocabulary."""

from megatron_fuse.capture.distributions import SparseRows
from megatron_fuse.capture.shards import (
    CAPTURED,
    STATUSES,
    CaptureShard,
    Conversation,
    capture_shard,
    read_capture_shard,
)
from megatron_fuse.capture.stage import CAPTURES, capture, require_backend

__all__ = [
    "CAPTURED",
    "CAPTURES",
    "STATUSES",
    "CaptureShard",
    "Conversation",
    "SparseRows",
    "capture",
    "capture_shard",
    "read_capture_shard",
    "require_backend",
]
