"""Phases, and the schedules of the ProFuser paper by name.

In each phase a mode's loss is weight * (CE + lambda * KL): weight is the paper's w1 (inference mode) or w2 (training mode). Both are
numbers, or ramps over the phase; with a single phase, over the run. The paper's schedules are steps of the same thing.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NonNegative = Annotated[float, Field(ge=0)]


class Ramp(BaseModel):
    """A value that goes from one end of a phase to the other: its first step has `from`, its last has `to`."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)
    from_: NonNegative = Field(alias="from")
    to: NonNegative
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """progress: from 0 to 1."""
        passed = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.from_ + (self.to - self.from_) * passed


Schedulable = NonNegative | Ramp


def value_at(value: float | Ramp, progress: float) -> float:
    """A weight or lambda when so much of its phase is done, from 0 to 1."""
    return value.at(progress) if isinstance(value, Ramp) else value


def _highest(value: float | Ramp) -> float:
    return max(value_at(value, 0.0), value_at(value, 1.0))


class ModeWeights(BaseModel):
    """weight * (CE + lambda * KL) of one mode. A weight that is 0 all along leaves the mode's documents out of the phase."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)
    weight: Schedulable = 0.0
    lambda_: Schedulable = Field(0.0, alias="lambda")

    @property
    def is_used(self) -> bool:
        return _highest(self.weight) > 0

    @property
    def needs_teacher(self) -> bool:
        return self.is_used and _highest(self.lambda_) > 0


class Phase(BaseModel):
    """Some epochs over all examples under one set of weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    epochs: Annotated[int, Field(gt=0)]
    inference: ModeWeights = ModeWeights()
    training: ModeWeights = ModeWeights()

    @model_validator(mode="after")
    def _learns_something(self) -> "Phase":
        if not self.inference.is_used and not self.training.is_used:
            raise ValueError("both modes have weight 0: the phase would learn nothing")
        return self


def _phase(name: str, epochs: int, *, w1: float = 0, l1: float = 0, w2: float = 0, l2: float = 0) -> Phase:
    return Phase(
        name=name,
        epochs=epochs,
        inference=ModeWeights(weight=w1, lambda_=l1),
        training=ModeWeights(weight=w2, lambda_=l2),
    )


_INFERENCE = {"w1": 1, "l1": 0.1}
_BOTH = {"w1": 0.1, "l1": 0.5, "w2": 1, "l2": 0.5}
_TRAINING = {"w2": 1, "l2": 0.5}

# arXiv 2408.04998, section 4 and Table 1. The order of ReverseFuse's weights is not spelled out there: `reversefuse` swaps
# ProFuser's phases as they are, `reversefuse_strict` keeps the inference mode out of the first.
PRESETS: dict[str, list[Phase]] = {
    "csft": [_phase("sft", 3, w2=1)],
    "fuse": [_phase("fuse", 3, **_TRAINING)],
    "simulfuse": [_phase("co-fusion", 3, **_BOTH)],
    "reversefuse": [_phase("co-fusion", 2, **_BOTH), _phase("inference", 1, **_INFERENCE)],
    "reversefuse_strict": [_phase("training", 2, **_TRAINING), _phase("inference", 1, **_INFERENCE)],
    "profuser": [_phase("inference", 1, **_INFERENCE), _phase("co-fusion", 2, **_BOTH)],
}
