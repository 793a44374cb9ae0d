"""Plans of a recipe for GPUs that need not be there: layouts, memory, time and disk of every stage.

Everything is an estimate, from the models' config.json and from rates: megatron_fuse/planning/rates.py lists
what is assumed.
"""

from megatron_fuse.planning.gpus import GPUS, Cluster, Gpu, parse_cluster
from megatron_fuse.planning.plan import Plan, StagePlan, make_plan
from megatron_fuse.planning.rates import Rates, assumed_rates, read_rates
from megatron_fuse.planning.sizes import ModelSize, read_size
from megatron_fuse.planning.table import plan_lines

__all__ = [
    "GPUS",
    "Cluster",
    "Gpu",
    "ModelSize",
    "Plan",
    "Rates",
    "StagePlan",
    "assumed_rates",
    "make_plan",
    "parse_cluster",
    "plan_lines",
    "read_rates",
    "read_size",
]
