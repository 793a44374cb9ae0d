"""Reads an instruction file, samples it, cuts responses to length, and splits off the validation examples.

    megatron-fuse prepare --recipe examples/quickstart/recipe.yaml

Writes WORKDIR/instructions, and prints what was left out and why. In this directory, examples.bad_rows.jsonl
has every row that cannot be used, with line, kind and reason, and examples.dropped.jsonl has every example
left out for its length. docs/data.md describes the forms of data.
"""

import argparse

from megatron_fuse.cli.claim_arguments import add_claim_arguments, take_claims
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_claim_arguments(parser, may_leave=False)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from_arguments(arguments)
    take_claims(arguments)
    with importing():
        from megatron_fuse.instructions import left_out, prepare_instructions
        from megatron_fuse.stages import Context
        from megatron_fuse.target import check_target_tokenizer, read_target
    context = Context(recipe)
    check_target_tokenizer(context.target, read_target(context.recipe))
    artifact = prepare_instructions(context)
    if artifact:
        say(artifact.summary)
        for line in left_out(artifact):
            say(line)
