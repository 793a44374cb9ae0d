"""All checks in the order in which they run: the most valuable first, for a machine whose time is short."""

from dataclasses import dataclass

MINUTES = 8  # of a run on a GPU


@dataclass(frozen=True)
class Check:
    """A module with a function `run(device, directory)`."""

    name: str
    module: str
    seconds: float  # after which it is ended, in a run of MINUTES or fewer; in a longer one in proportion


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
