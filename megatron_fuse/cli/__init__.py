"""The commands of `megatron-fuse`, one module each: `add_arguments(parser)` and `run(arguments)`.

`run` imports the library after it has read the recipe, within `start.importing`. Torch, transformers and
Megatron-core take seconds to import. `--help`, `--print-recipe`, the completion of a command line and an
error about an unknown option must not wait for these imports. So a module of this package imports at its top
only what its arguments need.
"""
