"""All checks in the order in which they run.

The most valuable come first, as time on a machine may be short.
"""

from dataclasses import dataclass

MINUTES = 8  # duration of a run of all checks on a GPU


@dataclass(frozen=True)
class Check:
    """A check: the name of its module, which has a function `run(device, directory)`."""

    name: str
    module: str
    seconds: float  # time limit in a run of at most MINUTES; in a longer run it grows in proportion


CHECKS = tuple(
    Check(name, f"{__package__}.{module}", seconds)
    for name, module, seconds in (
        ("machine", "machine", 30),
        ("devices", "placement", 45),
        ("kernels", "kernels", 90),
        ("benchmark", "kernel_benchmark", 120),
        ("top-k", "top_k_benchmark", 45),
        ("training", "training_steps", 150),
        ("recipe", "small_recipe", 150),
        ("reading", "reading", 90),
    )
)
