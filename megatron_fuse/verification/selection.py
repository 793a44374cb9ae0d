"""Checks the choice between the sources against the facts that it was made from."""

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
Facts = Mapping[str, np.ndarray]
"""The arrays of teachers/SOURCE/MODE/*.examples.safetensors, [n] each: one value per example."""
FACTS = {"available", "lossy", "ce_sum", "response_bytes", "response_tokens", "answer"}


def read_facts(path: Path, examples: int) -> Facts:
    """The facts of a shard's examples.

    Raises UserError if they cannot be read, or have another number of examples.
    """
    try:
        facts = load_file(path)
        if FACTS - facts.keys():
            raise UserError(f"it holds {sorted(facts)}, but {sorted(FACTS)} are needed")
        for name in FACTS:
            if facts[name].shape != (examples,) or facts[name].dtype.kind not in "biuf":
                raise UserError(
                    f"{name} is {facts[name].dtype} {facts[name].shape}, but {examples} real numbers are needed"
                )
    except (UserError, SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: the values for the selection cannot be read ({brief(str(error), 200)}){fix(path)}"
        ) from error
    return {name: facts[name] for name in FACTS}


def fact_problems(path: Path, facts: Facts, rows: np.ndarray, names: list[str], mode: str) -> Problems:
    """Problems of the facts of one shard.

    rows int64 [n]: supervised tokens of the documents of the source's rows.

    names [n]: the examples' ids.
    """
    rules = {"is not 0 or 1": facts["available"] > 1, "but it has no document": (facts["available"] == 1) & (rows == 0)}
    if mode == "training":
        rules["but it has no cross-entropy"] = (facts["available"] == 1) & np.isnan(facts["ce_sum"])  # may be infinite
    for what, bad in rules.items():
        if bad.any():
            example = int(bad.argmax())
            more = f" (and {bad.sum() - 1:,} more in this file)" if bad.sum() > 1 else ""
            available = facts["available"][example]
            yield f"{path}: example {names[example]!r}: available is {available}, {what}{more}{fix(path)}"


def selection_problems(
    context: Context, mode: str, parents: Mapping[str, str], facts: list[Facts], names: list[str]
) -> Problems:
    """Problems of the stored selection of one mode.

    parents: sha256 of the text and of the rows of every source. facts: of each source, in the recipe's order.
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
        yield f"{path}: the scores that it was chosen by are missing, here and at their stage: {FIX}"
        return
    wanted = choose(recipe, mode, facts, evidence)
    yield from difference_problems(path, stored, wanted, names, basis="the sources' facts", fix=FIX)


def _evidence(context: Context, mode: str, examples: int, found: Facts) -> Facts | None:
    """What the choice compares, from its stages; if that is missing or damaged, what is stored with the selection.

    None if it is not there either. The check of the artifacts reports the damage itself.
    """
    try:
        return read_evidence(context, mode, examples)
    except (UserError, OSError, ValueError, EOFError):
        shapes = evidence_shapes(context.recipe, mode, examples)
        if any(name not in found or found[name].shape != shape for name, shape in shapes.items()):
            return None
        return {name: found[name] for name in shapes}
