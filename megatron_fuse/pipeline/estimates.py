"""Rough estimates of the examples and tokens of a recipe, for `--plan`, before any stage has run.

Until the instructions are prepared, a token is assumed to be four bytes of text. The prepared instructions
state the number of the target's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from megatron_fuse.chat import supervised_turns
from megatron_fuse.chat.nested_texts import texts_in
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import INSTRUCTIONS, Example, example_shards
from megatron_fuse.instructions.rows import read_rows
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Amounts, Context
from megatron_fuse.storage import Artifact

_BYTES_PER_TOKEN = 4
_LOOKED_AT = 1000  # examples whose texts are measured


def estimate_amounts(context: Context) -> Amounts:
    """The amounts of the prepared instructions if there are any, else of the rows of the user's file.

    Reads every row of the user's file once. Raises UserError for a file that cannot be read or has no usable
    row.
    """
    recipe, artifact = context.recipe, _prepared(context)
    if artifact:
        counts, prepared = artifact.counts, chain.from_iterable(example_shards(artifact))
        sizes = _mean_sizes(recipe, list(islice(prepared, _LOOKED_AT)))
        scale = counts["target_tokens"] / counts["examples"] / max(sizes.conversation, 1e-9)
        return _amounts(recipe, counts["examples"], counts["held_out"], sizes, scale)
    rows = read_rows(recipe.data.path, recipe.data.format, every_turn=recipe.data.supervise == "every_turn")
    if not rows:
        raise UserError(
            f"{recipe.data.path}: none of its {len(rows.bad)} rows can be used in {rows.form} form"
        )
    examples = min(recipe.data.samples or len(rows), len(rows))
    # Taken from all parts of the file, because its rows may be sorted.
    looked_at = list(rows.lines)[:: -(-len(rows) // _LOOKED_AT)]
    sizes = _mean_sizes(recipe, list(rows.read(looked_at)))
    scale = min(1.0, recipe.training.seq_length / sizes.conversation)
    return _amounts(recipe, examples, min(recipe.data.validation_samples, examples - 1), sizes, scale)


def stated_amounts(recipe: Recipe, prompt_tokens: float, response_tokens: float) -> Amounts:
    """The amounts of data.samples examples with so many tokens each: for a plan without the user's file.

    Raises UserError if the recipe does not state data.samples.
    """
    if recipe.data.samples is None:
        raise UserError(
            "--prompt-tokens and --response-tokens are those of one example, but data.samples is not set. "
            "Set it to the number of examples."
        )
    conversation = prompt_tokens + response_tokens
    answer = min(response_tokens, recipe.responses.max_new_tokens)
    sizes = _Sizes(conversation, response_tokens, response_tokens, answer)
    scale = min(1.0, recipe.training.seq_length / conversation)
    examples = recipe.data.samples
    return _amounts(recipe, examples, min(recipe.data.validation_samples, examples - 1), sizes, scale)


def _prepared(context: Context) -> Artifact | None:
    try:
        return context.open(INSTRUCTIONS)
    except UserError:  # missing, or of another recipe: their own line of the plan reports it
        return None


@dataclass(frozen=True)
class _Sizes:
    """Mean numbers of tokens per example, estimated from its bytes."""

    conversation: float
    learned: float  # the supervised turns of the conversation
    last: float  # the last response
    answer: float  # the last response, but at most max_new_tokens


def _mean_sizes(recipe: Recipe, examples: Sequence[Example]) -> _Sizes:
    every_turn, limit = recipe.data.supervise == "every_turn", recipe.responses.max_new_tokens
    conversation = learned = last = answer = 0.0
    for example in examples:
        response = _tokens(example.response)
        conversation += (
            _tokens(example.system or "")
            + sum(_tokens(each["content"]) for each in example.messages)
            + response
        )
        calls = [each["tool_calls"] for each in example.messages if "tool_calls" in each]
        conversation += sum(_tokens(text) for text in texts_in([example.tools, calls]))
        turns = supervised_turns(example.messages, example.response, every_turn=every_turn)
        learned += sum(_tokens(turn) for turn in turns)
        last += response
        answer += min(response, limit)
    count = len(examples)
    return _Sizes(conversation / count, learned / count, last / count, answer / count)


def _tokens(text: str) -> float:
    return len(text.encode()) / _BYTES_PER_TOKEN


def _amounts(recipe: Recipe, examples: int, validation_examples: int, sizes: _Sizes, scale: float) -> Amounts:
    """The amounts.

    scale: number of tokens of a conversation, divided by the number estimated from its bytes.
    """
    answer = min(sizes.answer * scale, recipe.responses.max_new_tokens)
    return Amounts(
        examples,
        validation_examples,
        prompt_tokens=examples * scale * (sizes.conversation - sizes.learned),
        response_tokens=examples * scale * sizes.learned,
        question_tokens=examples * scale * (sizes.conversation - sizes.last),
        answer_tokens=examples * answer,
    )
