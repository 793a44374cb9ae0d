"""What a machine with a GPU can show of this project: one check per file, each in a process of its own (`megatron-fuse check-gpu`).

A check is a function `run(device, directory)` that yields rows. device: "cuda", or "cpu" for the same code at tiny sizes, where no
limit on time counts. directory: an empty one of its own. What it prints goes to a log beside it.
"""

from megatron_fuse.gpu_checks.catalogue import CHECKS, MINUTES, Check
from megatron_fuse.gpu_checks.report import markdown
from megatron_fuse.gpu_checks.rows import Row

__all__ = ["CHECKS", "MINUTES", "Check", "Row", "markdown"]
