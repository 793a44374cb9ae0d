"""Small files of arrays that every build writes anew: safetensors with their own checksum, because no
manifest lists them.

header: made    JSON {basis, sha256}. basis: an object, the inputs of the arrays and the rule that made them.
                sha256: the hash
                of the basis and of all arrays, with their names, types and shapes
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from megatron_fuse.errors import UserError
from megatron_fuse.storage import sha256_of_json, sha256_of_parts, write_safetensors
from megatron_fuse.storage.artifact import shown


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], basis: Mapping[str, Any]) -> None:
    """Writes the file completely or not at all. basis: see the module."""
    made = json.dumps({"basis": basis, "sha256": _checksum(arrays, basis)})
    write_safetensors(path, arrays, {"made": made})


def read_arrays(path: Path, fix: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, basis). Raises UserError, which ends in `fix`, if the file is missing,
    damaged or of another program."""
    try:
        with safe_open(path, "np") as file:
            made = json.loads((file.metadata() or {})["made"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        basis, recorded = made["basis"], made["sha256"]
        if (computed := _checksum(arrays, basis)) != recorded:
            raise ValueError(
                f"arrays and basis have sha256 {computed[:12]}..., but {shown(recorded)[:32]} is recorded"
            )
        if not isinstance(basis, dict):
            raise ValueError(f"the basis is a {type(basis).__name__} instead of an object")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist. {fix}") from error
    except KeyError as error:
        raise UserError(
            f"{path}: the header has no {error}, so another program or version wrote it. {fix}"
        ) from error
    except (SafetensorError, OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}). {fix}") from error
    return arrays, basis


def _checksum(arrays: Mapping[str, np.ndarray], basis: Mapping[str, Any]) -> str:
    described = [
        (f"{name} {arrays[name].dtype} {arrays[name].shape}", arrays[name]) for name in sorted(arrays)
    ]
    return sha256_of_parts(
        sha256_of_json(basis).encode(),
        *(part for text, array in described for part in (text.encode(), array.tobytes())),
    )
