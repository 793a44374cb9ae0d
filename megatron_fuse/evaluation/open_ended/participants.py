"""The models of an open-ended evaluation: those that generate, and those whose answers are in a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.models import models_named
from megatron_fuse.evaluation.open_ended.prompts import Prompt
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.model.config_file import end_token_ids
from megatron_fuse.recipe import TARGET, AnsweringOptions, Recipe
from megatron_fuse.recipe.lookup import answering_options, recipe_key
from megatron_fuse.recipe.values import Precision
from megatron_fuse.storage.records import quoted
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization import load_tokenizer


@dataclass(frozen=True)
class Participant:
    """A model to compare.

    options: how it generates; None if its answers are in the prompts file. where: its key in the recipe, or
    its name if it is not in the recipe, for errors.
    """

    name: str
    options: AnsweringOptions | None
    where: str
    in_recipe: bool = False

    @cached_property
    def directory(self) -> Path | None:
        """The Hugging Face directory of a model that generates. Raises UserError if there is none."""
        return resolve_model(self.options.model, f"{self.where}.model") if self.options else None


def participants_named(
    texts: Sequence[str], prompts: Sequence[Prompt], recipe: Recipe | None, dtype: Precision
) -> list[Participant]:
    """The models that the command line names.

    `NAME=DIR` generates from a Hugging Face model directory, in this dtype. `NAME` alone is a source or the
    target of the recipe, which generates by the options of the recipe; any other name is that of a model with
    answers in the prompts file.

    Raises UserError for a name that is neither, that is both, or that is given twice, for fewer than two
    models, and for a model of the recipe that does not answer in this process.
    """
    named = {text.partition("=")[0]: text for text in texts}
    if len(named) < len(texts):
        names = [text.partition("=")[0] for text in texts]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the name {quoted(repeated)} is given twice. Rename one of the models.")
    if len(named) < 2:
        raise UserError("answers are compared in pairs: name at least two models")
    given = dict.fromkeys(name for prompt in prompts for name in prompt.given)
    return [_participant(name, text, list(given), recipe, dtype) for name, text in named.items()]


def _participant(
    name: str, text: str, given: Sequence[str], recipe: Recipe | None, dtype: Precision
) -> Participant:
    if "=" in text:
        (model,) = models_named([text])
        return Participant(name, AnsweringOptions(model=str(model.directory), dtype=dtype), name)
    in_recipe = recipe is not None and name in (*recipe.sources, TARGET)
    if in_recipe == (name in given):
        known = [*(recipe.sources if recipe else ()), *([TARGET] if recipe else []), *given]
        state = (
            "both a model of the recipe and" if in_recipe else "neither a model of a recipe (--recipe) nor"
        )
        fix = f"Write {name}=DIR" if in_recipe else "Write NAME=DIR, or choose one of"
        listed = "" if in_recipe else f" {brief(', '.join(known) or '(there are none)', 200)}"
        raise UserError(f"{name}: this is {state} a model with answers in the prompts file. {fix}{listed}.")
    if not in_recipe:
        return Participant(name, None, name)
    assert recipe is not None
    options, where = answering_options(recipe, name), recipe_key(name)
    if options.server or options.responses:
        key = "server" if options.server else "responses"
        raise UserError(
            f"{where}.{key}: this model does not answer in this process. Write {name}=DIR, or put its "
            "answers into the prompts file under another name."
        )
    return Participant(name, options, where, in_recipe=True)


def format_of(participant: Participant) -> ChatFormat:
    """Tokenizer and chat format of a participant that generates. Raises UserError if they are missing."""
    options, directory = participant.options, participant.directory
    if options is None or directory is None:
        raise ValueError(f"{participant.name} generates no answers")
    if participant.in_recipe:
        return load_format(options, participant.where)
    tokenizer = load_tokenizer(directory)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{participant.name}: {directory} has no chat template. Put a chat_template.jinja beside its "
            "tokenizer. Or give a recipe (--recipe) with the model and its chat_template among the sources, "
            "and name the source without a directory."
        )
    return load_chat_format(tokenizer, where=participant.name, end_ids=end_token_ids(directory))
