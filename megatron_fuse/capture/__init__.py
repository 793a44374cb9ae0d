"""Capture: every source's sparse next-token distributions over a response, in the source's own vocabulary."""

from megatron_fuse.capture.shards import EXACT_STATUS, STATUSES, CaptureShard, read_capture_shard
from megatron_fuse.capture.stage import MODES, capture, open_capture, plan_capture

__all__ = [
    "EXACT_STATUS",
    "MODES",
    "STATUSES",
    "CaptureShard",
    "capture",
    "open_capture",
    "plan_capture",
    "read_capture_shard",
]
