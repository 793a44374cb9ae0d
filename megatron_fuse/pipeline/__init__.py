"""The pipeline of a recipe: its stages in order, their costs, and the commands that run them."""

from megatron_fuse.pipeline.preflight import check_files
from megatron_fuse.pipeline.stages import STAGES, Work, steps

__all__ = ["STAGES", "Work", "check_files", "steps"]
