"""The arguments of `megatron-fuse evaluate --open-ended`, and what it does."""

import argparse
import json
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import (
    RewardModelOptions,
    ServerOptions,
    checked,
    checked_value,
    path_argument,
    read_recipe,
)
from megatron_fuse.recipe.values import BatchTokens, Precision, SamplingTemperature, Seed, Share, Tokens
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say

_PRECISIONS = ("fp32", "bf16", "fp16")
# Keys of a server of the recipe that are options of the judge: the judge is always asked at `chat`.
_JUDGE_KEYS = [key for key in ServerOptions.model_fields if key not in ("endpoint", "engine")]
# Option of an answer -> the type of its value, its default and its help.
_SAMPLING: dict[str, tuple[Any, Any, str]] = {
    "temperature": (SamplingTemperature, 0.0, "sampling temperature of all models; 0: the likeliest token"),
    "top_p": (Share, 1.0, "sample from the likeliest tokens with this share of the probability"),
    "seed": (Seed, 0, "seed of the sampling"),
    "batch_tokens": (BatchTokens, 16384, "tokens per forward pass, of models and reward models"),
}
_OTHERS = ("recipe", "reward_model", "pairs", "dtype")


def add_open_ended_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of --open-ended")
    group.add_argument(
        "--recipe",
        type=path_argument,
        help="recipe whose reward models judge, and whose sources can be named without a directory",
    )
    group.add_argument(
        "--reward-model",
        action="append",
        metavar="NAME=DIR",
        help="reward model that judges, in place of those of the recipe; can be given several times: they "
        "vote, and the first decides ties",
    )
    for key in _JUDGE_KEYS:
        field = ServerOptions.model_fields[key]
        default = "" if field.is_required() or field.default in (None, "") else f"; default: {field.default}"
        more = "; as JSON" if key == "extra" else default
        group.add_argument(
            f"--judge-{key.replace('_', '-')}",
            metavar=key.upper(),
            help=f"server of a judge: {field.description}{more}",
        )
    group.add_argument(
        "--pairs",
        choices=("baseline", "all"),
        help="compare every model with the baseline, or all pairs of models; default: baseline",
    )
    group.add_argument(
        "--dtype", choices=_PRECISIONS, help="precision of the models given as NAME=DIR; default: bf16"
    )
    for name, (_, default, description) in _SAMPLING.items():
        kind = float if isinstance(default, float) else int
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, help=f"{description}; default: {default:g}")


def open_ended_given(arguments: argparse.Namespace) -> list[str]:
    """The flags of this file that were given."""
    names = [*_OTHERS, *_SAMPLING, *(f"judge_{key}" for key in _JUDGE_KEYS)]
    return [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]


def run_open_ended(arguments: argparse.Namespace) -> None:
    values = {name: _value(arguments, name, kind, default) for name, (kind, default, _) in _SAMPLING.items()}
    max_new_tokens = 1024
    if arguments.max_new_tokens is not None:
        max_new_tokens = checked_value(Tokens, arguments.max_new_tokens, "--max-new-tokens")
    server = _judge_server(arguments)
    recipe = read_recipe(arguments.recipe) if arguments.recipe else None
    with importing():
        from megatron_fuse.evaluation import open_ended
        from megatron_fuse.evaluation.models import models_named
        from megatron_fuse.evaluation.open_ended.page import results_markdown
    named = {
        model.name: RewardModelOptions(model=str(model.directory))
        for model in models_named(arguments.reward_model or [])
    }
    prompts = open_ended.read_prompts(arguments.open_ended, arguments.limit)
    dtype: Precision = arguments.dtype or "bf16"
    batch_tokens = values.pop("batch_tokens")
    results = open_ended.evaluate_open_ended(
        open_ended.participants_named(arguments.models, prompts, recipe, dtype),
        prompts,
        arguments.output,
        open_ended.Judges(open_ended.reward_models_of(recipe, named), server, batch_tokens),
        sampling=open_ended.Sampling(arguments.limit, max_new_tokens=max_new_tokens, **values),
        baseline=arguments.baseline,
        pairs=arguments.pairs or "baseline",
        batch_tokens=batch_tokens,
    )
    say(f"\n{results_markdown(results)}\nwritten to {arguments.output}")


def _value(arguments: argparse.Namespace, name: str, kind: Any, default: Any) -> Any:
    given = getattr(arguments, name)
    return default if given is None else checked_value(kind, given, f"--{name.replace('_', '-')}")


def _judge_server(arguments: argparse.Namespace) -> ServerOptions | None:
    """The options of the judge's server; None if none of them is given.

    Raises UserError, which names the flag, for a wrong or a missing one.
    """
    content: dict[str, Any] = {}
    for key in _JUDGE_KEYS:
        given = getattr(arguments, f"judge_{key}")
        if given is not None:
            content[key] = _read(key, given)
    if not content:
        return None
    flag = {key: f"--judge-{key.replace('_', '-')}" for key in ServerOptions.model_fields}
    return checked(
        ServerOptions, content, lambda keys: flag.get(str(keys[0]), "--judge") if keys else "--judge"
    )


def _read(key: str, text: str) -> Any:
    """A value of the command line as the type of its key: numbers and JSON are read, texts stay."""
    if key not in ("concurrency", "timeout", "max_retries", "extra"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        wanted = "JSON" if key == "extra" else "a number"
        raise UserError(f"--judge-{key.replace('_', '-')}: must be {wanted}, not {text!r}") from error
