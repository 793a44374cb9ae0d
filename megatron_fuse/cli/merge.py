"""Merge models of one architecture into one, without data or training (the baselines of the paper's Table 3).

    megatron-fuse merge --method slerp --model runs/csft/export --model models/Llama-2-7b-chat-hf \\
        --output merged/slerp
    megatron-fuse merge --method ties --model A:0.7 --model B:0.3 --base models/Llama-2-7b-hf \\
        --density .5 --output OUT
    megatron-fuse merge --method dare_ties --model A --model B --base BASE --density .5 --seed 0 \\
        --output OUT

Tokenizer, chat template and config come from the first --model. The merge runs on a CPU, offline, in fp32. If
it is finished already, a second run does nothing. Needs mergekit: pip install 'megatron-fuse[merge]'.
Formulae and conventions: docs/merging.md
"""

import argparse
from typing import get_args

from megatron_fuse.merge_options import DEFAULTS, METHODS, RESCALES, ROWS, Merge
from megatron_fuse.recipe import path_argument
from megatron_fuse.recipe.values import Precision
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="DIR[:WEIGHT]",
        help="model to merge, once per model. Without weights every model has the same share (slerp uses "
        "--t instead)",
    )
    parser.add_argument("--base", metavar="DIR", help="ties, dare_*: model that the others were trained from")
    parser.add_argument(
        "--t", type=float, help=f"slerp: 0 is the first model, 1 is the second (default {DEFAULTS['t']})"
    )
    parser.add_argument(
        "--density",
        type=float,
        help="ties, dare_*: share of the differences to the base that is kept, above 0 and at most 1 "
        f"(default {DEFAULTS['density']})",
    )
    parser.add_argument(
        "--rescale",
        choices=RESCALES,
        help="dare_*: how the kept differences are scaled. density (default): divided by the density, as in "
        "DARE's paper and in mergekit when ProFuser was written. l1: multiplied so that each tensor keeps "
        "its L1 norm, as in mergekit today",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help=f"dare_*: seed of the random choice of dropped differences (default {DEFAULTS['seed']})",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(Precision),
        help="precision of the merged weights (default: that of the models; fp32 if they differ)",
    )
    parser.add_argument(
        "--rows",
        choices=ROWS,
        help="use this if the vocabularies have different sizes: every model gets the rows of the first. "
        "Extra rows are cut, and missing rows are copied from the first model. Without it, such models are "
        "refused",
    )
    parser.add_argument("--output", type=path_argument, required=True)


def run(arguments: argparse.Namespace) -> None:
    with importing():
        from megatron_fuse.huggingface.resolving import resolve_model
        from megatron_fuse.merging import RECORD, merge_models, read_models
        from megatron_fuse.storage import read_json
    models, weights = read_models(arguments.model)
    merge = Merge(
        method=arguments.method,
        models=models,
        weights=weights,
        base=resolve_model(arguments.base, "--base") if arguments.base else None,
        t=arguments.t,
        density=arguments.density,
        rescale=arguments.rescale,
        seed=arguments.seed,
        dtype=arguments.dtype,
        rows=arguments.rows,
    )
    made = merge_models(merge, arguments.output)
    dtype = read_json(arguments.output / RECORD)["dtype"]
    say(f"{arguments.output}: {'merged' if made else 'this merge was there already'}, in {dtype}")
