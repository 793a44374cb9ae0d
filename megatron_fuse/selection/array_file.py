"""Small files of arrays that every build writes anew: safetensors with a checksum of their own, as no manifest lists them.

header: made    JSON {basis, sha256}: what the arrays were made from and by which rule (an object); the hash of that and of
                all arrays, with their names, types and shapes
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from megatron_fuse.errors import UserError
from megatron_fuse.storage import sha256_of_bytes, sha256_of_json, write_safetensors
from megatron_fuse.storage.artifact import shown


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], basis: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all."""
    made = json.dumps({"basis": basis, "sha256": _checksum(arrays, basis)})
    write_safetensors(path, arrays, {"made": made})


def read_arrays(path: Path, fix: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, basis). Raises UserError, which ends in `fix`, where the file is missing, damaged or another program's."""
    try:
        with safe_open(path, "np") as file:
            made = json.loads((file.metadata() or {})["made"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        basis, recorded = made["basis"], made["sha256"]
        if (found := _checksum(arrays, basis)) != recorded:
            raise ValueError(f"arrays and basis have sha256 {found[:12]}..., recorded is {shown(recorded)[:32]}")
        if not isinstance(basis, dict):
            raise ValueError(f"its basis is a {type(basis).__name__} instead of an object")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {fix}") from error
    except KeyError as error:
        raise UserError(f"{path}: its header has no {error}, as of another program or version: {fix}") from error
    except (SafetensorError, OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}): {fix}") from error
    return arrays, basis


def _checksum(arrays: Mapping[str, np.ndarray], basis: Mapping[str, Any]) -> str:
    described = [(f"{name} {arrays[name].dtype} {arrays[name].shape}", arrays[name]) for name in sorted(arrays)]
    return sha256_of_bytes(
        sha256_of_json(basis).encode(),
        *(part for text, array in described for part in (text.encode(), array.tobytes())),
    )
