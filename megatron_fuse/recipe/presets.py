"""Phases, and the schedules of the ProFuser paper by name.

In each phase the loss of a mode is weight * (CE + lambda * KL). The weight is the paper's w1 (inference mode)
or w2 (training mode). Weight and lambda are numbers, or ramps over the phase; in a schedule of one phase, a
ramp goes over the whole run. The paper's schedules have constant numbers in each phase.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from megatron_fuse.recipe.values import Epochs, Line, Options, Weight


class Ramp(Options):
    """A value that changes over a phase: the first step has `from`, the last step has `to`."""

    from_: Weight = Field(alias="from")
    to: Weight
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """The value at a progress from 0 to 1."""
        passed = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.from_ + (self.to - self.from_) * passed


def _form(value: Any) -> str:
    return "[ramp]" if isinstance(value, dict | Ramp) else "[number]"


# The form decides the type, so that an error is about the type that was meant. The tags are no keys: errors
# leave out names in brackets.
Schedulable = Annotated[
    Annotated[Weight, Tag("[number]")] | Annotated[Ramp, Tag("[ramp]")], Discriminator(_form)
]


def value_at(value: float | Ramp, progress: float) -> float:
    """A weight or lambda at a progress of its phase, from 0 to 1."""
    return value.at(progress) if isinstance(value, Ramp) else value


def _highest(value: float | Ramp) -> float:
    return max(value_at(value, 0.0), value_at(value, 1.0))


class ModeWeights(Options):
    """weight * (CE + lambda * KL) of one mode.

    If the weight is 0 in the whole phase, the mode's documents are left out.
    """

    weight: Schedulable = 0.0
    lambda_: Schedulable = Field(0.0, alias="lambda")

    @property
    def is_used(self) -> bool:
        return _highest(self.weight) > 0

    @property
    def needs_teacher(self) -> bool:
        return self.is_used and _highest(self.lambda_) > 0


class Phase(Options):
    """Some epochs over all examples under one set of weights.

    epochs: may be a fraction. The last epoch of the phase then ends early, after its share of the examples.
    """

    name: Line
    epochs: Epochs
    inference: ModeWeights = ModeWeights()
    training: ModeWeights = ModeWeights()

    @model_validator(mode="after")
    def _learns_something(self) -> "Phase":
        if not self.inference.is_used and not self.training.is_used:
            raise ValueError(
                "both modes have weight 0, so the phase learns nothing. Give one of them a weight."
            )
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

# arXiv 2408.04998, section 4 and Table 1. The paper does not spell out the order of ReverseFuse's weights:
# `reversefuse` swaps ProFuser's phases as they are, `reversefuse_strict` keeps the inference mode out of the
# first phase.
PRESETS: dict[str, list[Phase]] = {
    "csft": [_phase("sft", 3, w2=1)],
    "fuse": [_phase("fuse", 3, **_TRAINING)],
    "simulfuse": [_phase("co-fusion", 3, **_BOTH)],
    "reversefuse": [_phase("co-fusion", 2, **_BOTH), _phase("inference", 1, **_INFERENCE)],
    "reversefuse_strict": [_phase("training", 2, **_TRAINING), _phase("inference", 1, **_INFERENCE)],
    "profuser": [_phase("inference", 1, **_INFERENCE), _phase("co-fusion", 2, **_BOTH)],
}
