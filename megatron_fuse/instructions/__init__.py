"""Instructions: examples read from a user's file, checked, sampled and cut to length once for every later stage."""

from megatron_fuse.instructions.examples import Example, Rows, read_rows
from megatron_fuse.instructions.prepare import (
    example_shards,
    load_examples,
    open_instructions,
    plan_instructions,
    prepare_instructions,
)

__all__ = [
    "Example",
    "Rows",
    "example_shards",
    "load_examples",
    "open_instructions",
    "plan_instructions",
    "prepare_instructions",
    "read_rows",
]
