"""The number of a model's parameters, without reading its weights."""

from math import prod
from pathlib import Path

from megatron_fuse.model.weight_files import WeightFiles

# The number of four-bit weights in one element of a packed dtype: U8 of bitsandbytes, I32 of GPTQ and AWQ.
_PACKED = {"U8": 2, "torch.uint8": 2, "I32": 8, "torch.int32": 8}


def count_parameters(directory: Path) -> float:
    """The number of parameters in a directory's weight files, from their headers alone, for any stored dtype.

    Raises UserError for damaged files.
    """
    weights = WeightFiles(directory)
    return sum(prod(weights.shape(name)) * _PACKED.get(weights.dtype(name), 1) for name in weights.file_of)
