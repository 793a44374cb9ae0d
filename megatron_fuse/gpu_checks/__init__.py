"""Checks of this project on a GPU (`megatron-fuse check-gpu`): one per file, each in its own process.

A check is a function `run(device, directory)` that yields rows. device: "cuda", or "cpu" for the same code at
tiny sizes, where limits on time do not count. directory: an empty directory that only this check uses.
Printed output goes to a log beside it.
"""

from megatron_fuse.gpu_checks.catalogue import CHECKS, MINUTES, Check
from megatron_fuse.gpu_checks.report import markdown
from megatron_fuse.gpu_checks.rows import Row

__all__ = ["CHECKS", "MINUTES", "Check", "Row", "markdown"]
