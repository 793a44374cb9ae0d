"""What a merge can be: the methods, with the options that each of them has, and one merge as a record."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Method:
    """options: the fields of Merge that have a meaning for it. least, most: how many models it merges."""

    options: tuple[str, ...]
    least: int = 1
    most: int | None = None


_TASK_VECTORS = ("weights", "base", "density")
METHODS = {
    "linear": Method(("weights",), least=2),
    "slerp": Method(("t",), least=2, most=2),
    "ties": Method(_TASK_VECTORS),
    "dare_ties": Method((*_TASK_VECTORS, "rescale", "seed")),
    "dare_linear": Method((*_TASK_VECTORS, "rescale", "seed")),
}
DEFAULTS = {"t": 0.5, "density": 0.5, "rescale": "density", "seed": 0}
RESCALES = ("density", "l1")
ROWS = ("first",)


@dataclass(frozen=True)
class Merge:
    """What is merged and how. None is an option's default (DEFAULTS; weights: equal shares of 1), or that it has no meaning.

    models, base: Hugging Face directories. weights: one per model. t: 0 is the first model, 1 the second. density: share of
    a task vector's entries that is kept, of each tensor by itself. rescale: kept entries of DARE are divided by the density,
    or all multiplied by what restores the tensor's L1 norm (`l1`). dtype: of the result; fp32, bf16 or fp16. None: the models' own,
    and where they differ the one that holds them all. rows: where vocabularies differ in size, `first` gives all models as many rows
    as the first has: further ones are cut, and rows that any model lacks stay the first model's own. None: that is refused.
    """

    method: str
    models: tuple[Path, ...]
    weights: tuple[float, ...] | None = None
    base: Path | None = None
    t: float | None = None
    density: float | None = None
    rescale: str | None = None
    seed: int | None = None
    dtype: str | None = None
    rows: str | None = None
