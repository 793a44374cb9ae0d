"""The two modes in which a source can have the advantage on an example."""

from enum import StrEnum


class Mode(StrEnum):
    """INFERENCE compares sources by the answers that they generate, TRAINING by the ground truth that they
    predict.

    Tensors with one entry per mode hold the modes in this order.
    """

    INFERENCE = "inference"
    TRAINING = "training"


MODES: tuple[str, ...] = tuple(mode.value for mode in Mode)
