"""The methods of merging with the options of each, and one merge as a record."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Method:
    """A method of merging.

    options: the fields of Merge that it uses. least, most: number of models that it can merge.
    """

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
    """What is merged and how.

    If the method uses an option, None is its default (DEFAULTS; weights: equal shares of 1). If the method
    does not use the option, it must be None.

    models, base: Hugging Face directories.
    weights: one per model.
    t: 0 is the first model, 1 the second.
    density: the share of a task vector's entries that is kept, in each tensor by itself.
    rescale: what DARE does with the kept entries. `density` divides them by the density. `l1` multiplies all
        of them by the factor that restores the L1 norm of the tensor.
    dtype: of the result; fp32, bf16 or fp16. None: the dtype of the models; if they differ, the one that
        holds all of them.
    rows: what happens if the vocabularies differ in size. `first` gives all models as many rows as the first
        model has: further rows are cut, and a row that any model lacks stays as it is in the first model.
        None: a UserError.
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
