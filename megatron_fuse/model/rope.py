"""The rotary frequencies of a config, by transformers' own functions.

Megatron's forms of the scalings take fewer keys than the configs have, and would silently differ.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_fuse.errors import UserError
from megatron_fuse.model.config_file import reason
from megatron_fuse.storage.records import quoted

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rotation:
    """How a kind of layer rotates queries and keys."""

    inverse_frequencies: tuple[float, ...]  # [rotated channels / 2], radians per position, exact in fp32


def read_rotation(config: PreTrainedConfig, head_dim: int, origin: str) -> Rotation:
    """The rotation of a config. origin: the config's file, for messages.

    Raises UserError, which names the key, for an unsupported type and for a missing or impossible value.
    """
    rope = config.rope_parameters or {}
    _check_values(rope, origin)
    rope_type, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        frequencies = 1.0 / (theta**exponents)
    else:
        try:
            frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](config)
        except Exception as error:  # a key is missing or null
            raise UserError(
                f"{origin}: the frequencies cannot be computed from rope_scaling: {reason(error)}"
            ) from error
    if not (frequencies.isfinite() & (frequencies > 0)).all():
        raise UserError(
            f"{origin}: rope_theta ({theta}) and its scaling give frequencies that are not above 0"
        )
    return Rotation(tuple(frequencies.tolist()))


def _check_values(rope: dict[str, Any], origin: str) -> None:
    """Raises UserError for a type that is not supported, and for keys that the type does not have."""
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        allowed = ", ".join(SUPPORTED_ROPE_TYPES)
        raise UserError(
            f"{origin}: rope type {quoted(rope_type)} is not supported. Choose a model with a rope_type of "
            f"{allowed}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{origin}: partial_rotary_factor is {quoted(rope['partial_rotary_factor'])}, but only 1.0 is "
            "supported"
        )
    for key, value in rope.items():
        if isinstance(value, list):
            raise UserError(f"{origin}: {key} is {quoted(value)}, but must be one number for all layers")
    if rope.get("rope_theta") is None:
        raise UserError(
            f"{origin}: rope_theta is missing. Add the base of the rotary frequencies, such as 10000.0."
        )
    if rope_type == "default" and rope.get("factor") not in (None, 1):
        raise UserError(
            f"{origin}: factor is {rope['factor']}, but rope_type is 'default', which has no factor. "
            "Set rope_type."
        )
