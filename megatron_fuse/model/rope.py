"""The rotary frequencies of a config, by transformers' own functions.

Megatron's forms of the scalings take fewer keys than the configs have, and would silently differ.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_fuse.errors import UserError
from megatron_fuse.model.config_file import reason
from megatron_fuse.storage.records import quoted

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "dynamic", "yarn", "longrope")
LONGROPE_LISTS = ("short_factor", "long_factor")


@dataclass(frozen=True)
class Rotation:
    """How a kind of layer rotates queries and keys."""

    inverse_frequencies: tuple[float, ...]  # [rotated channels / 2], radians per position, exact in fp32
    scale: float  # of the rotated channels
    # The longest sequence that transformers rotates by these frequencies; None: any.
    longest: int | None


def read_rotation(
    config: PreTrainedConfig,
    head_dim: int,
    origin: str,
    *,
    partial: bool = False,
    layer_type: str | None = None,
) -> Rotation:
    """The rotation of a config: of layers of one type, or of all layers.

    origin: the config's file, for messages.
    partial: whether the class rotates only partial_rotary_factor of a head's channels.

    Raises UserError, which names the key, for an unsupported type and for a missing or impossible value.
    """
    rope = config.rope_parameters or {}
    if layer_type is not None:
        rope, origin = rope.get(layer_type) or {}, f"{origin}: rope_parameters.{layer_type}"
    _check_values(rope, origin)
    rope_type, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    rotated = _rotated_channels(rope, head_dim, origin, partial)
    scale = 1.0
    if rope_type == "default":
        exponents = torch.arange(0, rotated, 2, dtype=torch.float) / rotated
        frequencies = 1.0 / (theta**exponents)
    else:
        try:
            frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](config, layer_type=layer_type)
        except Exception as error:  # a key is missing or null
            raise UserError(
                f"{origin}: the frequencies cannot be computed from rope_scaling: {reason(error)}"
            ) from error
    if frequencies.shape != (rotated // 2,):
        raise UserError(
            f"{origin}: rope_scaling gives {frequencies.numel()} frequencies, but {rotated} rotated channels "
            f"need {rotated // 2}"
        )
    if not (frequencies.isfinite() & (frequencies > 0)).all():
        raise UserError(
            f"{origin}: rope_theta ({theta}) and its scaling give frequencies that are not above 0"
        )
    if not (isfinite(scale) and scale > 0):
        raise UserError(f"{origin}: attention_factor is {scale}, but must be above 0")
    # Below max_position_embeddings, which no sequence exceeds, `dynamic` does not change its frequencies.
    longest = rope["original_max_position_embeddings"] if rope_type == "longrope" else None
    return Rotation(tuple(frequencies.tolist()), float(scale), longest)


def _check_values(rope: dict[str, Any], origin: str) -> None:
    """Raises UserError for a type that is not supported, and for keys that the type does not have."""
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        allowed = ", ".join(SUPPORTED_ROPE_TYPES)
        raise UserError(
            f"{origin}: rope type {quoted(rope_type)} is not supported. Choose a model with a rope_type of "
            f"{allowed}."
        )
    for key, value in rope.items():
        if isinstance(value, list) and not (rope_type == "longrope" and key in LONGROPE_LISTS):
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


def _rotated_channels(rope: dict[str, Any], head_dim: int, origin: str, partial: bool) -> int:
    """The number of a head's channels that are rotated: the first ones.

    Raises UserError if the class rotates all channels but the config says otherwise, and for an odd number.
    """
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1.0 and not partial:
        raise UserError(
            f"{origin}: partial_rotary_factor is {quoted(factor)}, but only 1.0 is supported for this class"
        )
    rotated = int(head_dim * factor)
    if rotated < 2 or rotated % 2:
        raise UserError(
            f"{origin}: partial_rotary_factor {quoted(factor)} of head_dim {head_dim} is {rotated} channels, "
            "but must be an even number of at least 2"
        )
    return rotated
