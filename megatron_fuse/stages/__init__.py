"""What every stage of the pipeline shares: its record, and the context that it works in."""

from megatron_fuse.stages.amounts import Amounts
from megatron_fuse.stages.context import Context
from megatron_fuse.stages.stage import Key, Stage

__all__ = ["Amounts", "Context", "Key", "Stage"]
