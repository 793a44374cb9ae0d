"""The number of a model's parameters, without reading its weights."""

from math import prod
from pathlib import Path

from megatron_fuse.model.weight_files import WeightFiles

# Weights that one element of a packed type holds if they are quantised to four bits: bitsandbytes; GPTQ and AWQ.
_PACKED = {"U8": 2, "torch.uint8": 2, "I32": 8, "torch.int32": 8}


def count_parameters(directory: Path) -> float:
    """Of the weight files, from their headers alone, whatever the type in which they are stored. Raises UserError for damaged ones."""
    weights = WeightFiles(directory)
    return sum(prod(weights.shape(name)) * _PACKED.get(weights.dtype(name), 1) for name in weights.file_of)
