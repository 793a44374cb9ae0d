"""The two modes in which a source can have the advantage on an example."""

from enum import StrEnum


class Mode(StrEnum):
    """INFERENCE: by the answer that the source samples itself. TRAINING: by how well it reads the ground truth.

    Tensors with one entry per mode have the modes in this order.
    """

    INFERENCE = "inference"
    TRAINING = "training"


MODES: tuple[str, ...] = tuple(mode.value for mode in Mode)
