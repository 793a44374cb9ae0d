"""The record of a stage of the pipeline, and the context that all stages share."""

from megatron_fuse.stages.amounts import Amounts
from megatron_fuse.stages.context import Context
from megatron_fuse.stages.stage import Key, Stage

__all__ = ["Amounts", "Context", "Key", "Stage"]
