"""Instructions: a user's examples, read, checked, sampled and cut to length once for all later stages."""

from megatron_fuse.instructions.examples import Example, naming_example
from megatron_fuse.instructions.left_out import left_out
from megatron_fuse.instructions.prepare import (
    INSTRUCTIONS,
    example_shards,
    instructions_options,
    load_examples,
    prepare_instructions,
    require_categories,
    shard_sizes,
)
from megatron_fuse.instructions.rows import Rows, read_rows

__all__ = [
    "INSTRUCTIONS",
    "Example",
    "Rows",
    "example_shards",
    "instructions_options",
    "left_out",
    "load_examples",
    "naming_example",
    "prepare_instructions",
    "read_rows",
    "require_categories",
    "shard_sizes",
]
