"""Instructions: examples read from a user's file, checked, sampled and cut to length once for every later stage."""

from megatron_fuse.instructions.examples import Example, Rows, read_rows
from megatron_fuse.instructions.prepare import (
    example_shards,
    instructions_options,
    load_examples,
    open_instructions,
    plan_instructions,
    prepare_instructions,
    require_instructions,
)

__all__ = [
    "Example",
    "Rows",
    "example_shards",
    "instructions_options",
    "load_examples",
    "open_instructions",
    "plan_instructions",
    "prepare_instructions",
    "read_rows",
    "require_instructions",
]
