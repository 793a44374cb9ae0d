"""The commands of `megatron-fuse`, one module each: `add_arguments(parser)` says what a command takes, `run(arguments)` does it.

`run` imports the library, after it has read the recipe, and within `start.importing`. Torch, transformers and Megatron-core take
seconds to import, and nobody should wait for them to read `--help` or `--print-recipe`, to complete a command line, or to be told that
an option does not exist. So a module of this package imports at its top only what its arguments need.
"""
