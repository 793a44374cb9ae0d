"""The record of a stage of the pipeline, and the context that all stages share."""

from megatron_fuse.stages.amounts import Amounts
from megatron_fuse.stages.context import Context, lineage
from megatron_fuse.stages.stage import Key, Parents, Stage

__all__ = ["Amounts", "Context", "Key", "Parents", "Stage", "lineage"]
