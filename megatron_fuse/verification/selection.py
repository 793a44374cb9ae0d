"""Checks the choice between the sources against the examples' arrays that it was made from."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from megatron_fuse.errors import UserError
from megatron_fuse.selection.choice import FIX, choose, read_selection, selection_path
from megatron_fuse.selection.evidence import evidence_shapes, read_evidence
from megatron_fuse.stages import Context
from megatron_fuse.text_safety import brief
from megatron_fuse.verification.recomputed import difference_problems
from megatron_fuse.verification.shards import fix

Problems = Iterator[str]
ExampleArrays = Mapping[str, np.ndarray]
"""The arrays of teachers/SOURCE/MODE/*.examples.safetensors, [n] each: one value per example."""
EXAMPLE_ARRAYS = {"available", "lossy", "ce_sum", "response_bytes", "response_tokens", "answer"}


def read_example_arrays(path: Path, examples: int) -> ExampleArrays:
    """The arrays of a shard's examples that selection needs.

    Raises UserError if they cannot be read, or have another number of examples.
    """
    try:
        example_arrays = load_file(path)
        if EXAMPLE_ARRAYS - example_arrays.keys():
            raise UserError(f"it holds {sorted(example_arrays)}, but {sorted(EXAMPLE_ARRAYS)} are needed")
        for name in EXAMPLE_ARRAYS:
            if example_arrays[name].shape != (examples,) or example_arrays[name].dtype.kind not in "biuf":
                raise UserError(
                    f"{name} is {example_arrays[name].dtype} {example_arrays[name].shape}, but {examples} "
                    "real numbers are needed"
                )
    except (UserError, SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: the values for the selection cannot be read ({brief(str(error), 200)}){fix(path)}"
        ) from error
    return {name: example_arrays[name] for name in EXAMPLE_ARRAYS}


def example_problems(
    path: Path, example_arrays: ExampleArrays, rows: np.ndarray, names: list[str], mode: str
) -> Problems:
    """Problems of the examples' arrays of one shard.

    rows int64 [n]: supervised tokens of the documents of the source's rows.

    names [n]: the examples' ids.
    """
    rules = {
        "is not 0 or 1": example_arrays["available"] > 1,
        "but it has no document": (example_arrays["available"] == 1) & (rows == 0),
    }
    if mode == "training":
        # May be infinite.
        rules["but it has no cross-entropy"] = (example_arrays["available"] == 1) & np.isnan(
            example_arrays["ce_sum"]
        )
    for what, bad in rules.items():
        if bad.any():
            example = int(bad.argmax())
            more = f" (and {bad.sum() - 1:,} more in this file)" if bad.sum() > 1 else ""
            available = example_arrays["available"][example]
            yield f"{path}: example {names[example]!r}: available is {available}, {what}{more}{fix(path)}"


def selection_problems(
    context: Context,
    mode: str,
    parents: Mapping[str, str],
    example_arrays: list[ExampleArrays],
    names: list[str],
) -> Problems:
    """Problems of the stored selection of one mode.

    parents: sha256 of the text and of the rows of every source. example_arrays: of each source, in the
    recipe's order.
    names: ids of the examples.
    """
    recipe = context.recipe
    path = selection_path(recipe, mode)
    try:
        stored = read_selection(recipe, mode, parents).arrays
    except UserError as error:
        yield str(error)
        return
    if len(stored["source"]) != len(names):
        yield f"{path}: {len(stored['source'])} examples, but the text has {len(names)}. {FIX}"
        return
    beyond = (stored["source"] < -1) | (stored["source"] >= len(recipe.sources))
    if beyond.any():
        example = int(beyond.argmax())
        yield (
            f"{path}: example {names[example]!r}: the source is {stored['source'][example]}, but the recipe "
            f"has {len(recipe.sources)} sources, counted from 0. {FIX}"
        )
    evidence = _evidence(context, mode, len(names), stored)
    if evidence is None:
        yield f"{path}: the scores behind this choice are missing, here and at their stage. {FIX}"
        return
    wanted = choose(recipe, mode, example_arrays, evidence)
    yield from difference_problems(path, stored, wanted, names, basis="the sources' examples", fix=FIX)


def _evidence(context: Context, mode: str, examples: int, stored: ExampleArrays) -> ExampleArrays | None:
    """What the choice compares, from its stages; if that is missing or damaged, what is stored with the
    selection.

    None if it is not there either. The check of the artifacts reports the damage itself.
    """
    try:
        return read_evidence(context, mode, examples)
    except (UserError, OSError, ValueError, EOFError):
        shapes = evidence_shapes(context.recipe, mode, examples)
        if any(name not in stored or stored[name].shape != shape for name, shape in shapes.items()):
            return None
        return {name: stored[name] for name in shapes}
