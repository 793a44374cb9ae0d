"""View of a chat template: its text around a response, the learned tokens, and what ends an answer."""

from collections.abc import Iterator
from typing import Any

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.inspection.documents import conversation_lines, token_text
from megatron_fuse.recipe import TARGET, ModelOptions
from megatron_fuse.recipe.lookup import recipe_key
from megatron_fuse.stages import Context

_SAMPLE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 3 + 4?"},
]
_RESPONSE = "It is 7."


def formats_of(context: Context) -> Iterator[tuple[str, ChatFormat]]:
    """(key in the recipe, chat format) of the target, every source and every reward model."""
    for name in (TARGET, *context.recipe.sources):
        yield recipe_key(name), context.format(name)
    for name, options in context.recipe.reward_models.items():
        if options.model is not None:  # else its scores come from a file
            yield f"reward_models.{name}", context.reward_model_format(name)


def format_of_model(model: str) -> ChatFormat:
    """The chat format of a Hugging Face model directory with its own template."""
    return load_format(ModelOptions(model=model), "--template")


def view_template(name: str, chat: ChatFormat) -> dict[str, Any]:
    """{"model", "template", "tokens": [{"id", "text", "supervised"}], "stop", "ends": [{"id", "text"}],
    "generation_prompt", ...}

    tokens: a sample conversation with system message, earlier turn and response. generation_prompt: the text
    after which the model answers the last question of the sample. missing_of_tools: null if the template
    prints offered tools, calls and outputs, else the reason why it does not. The other keys are the fields of
    ChatFormat with these names.
    """
    try:
        sample, encoded = _SAMPLE, chat.encode_conversation(_SAMPLE, _RESPONSE)
    except UserError:  # the template allows only one question: leave out the earlier turn
        sample = [_SAMPLE[0], _SAMPLE[-1]]
        encoded = chat.encode_conversation(sample, _RESPONSE)

    def token(number: int) -> dict[str, Any]:
        return {"id": number, "text": token_text(chat.tokenizer, number)}

    return {
        "model": name,
        "template": chat.origin,
        "tokens": [
            token(number) | {"supervised": supervised}
            for number, supervised in zip(encoded.ids.tolist(), encoded.supervised.tolist(), strict=True)
        ],
        "stop": token(chat.stop_id),
        "ends": [token(number) for number in sorted(chat.end_ids)],
        "generation_prompt": chat.render_prompt(sample),
        "separator": chat.separator,
        "opening": chat.opening,
        "generation": chat.generation,
        "closing": chat.closing,
        "folds_system": chat.folds_system,
        "missing_of_tools": chat.missing_of_tools,
    }


def format_template_view(view: dict[str, Any]) -> str:
    """The view as text: the conversation with its token boundaries, then the properties of the template."""
    labels = [token for token in view["tokens"] if token["supervised"]]
    lines = [
        f"{view['model']}: {view['template']}",
        *conversation_lines(view["tokens"]),
        f"first learned token: {_shown(labels[0])}; last: {_shown(labels[-1])}",
        f"stop token, a label: {_shown(view['stop'])}; sampling ends at: "
        f"{', '.join(map(_shown, view['ends']))}",
        f"generation begins behind: {view['generation_prompt'][-60:]!r}",
    ]
    if view["generation"]:
        given = view["opening"] or view["separator"]
        lines.append(
            f"the generation prompt ends in {view['generation']!r}; before a given response the template "
            f"prints {repr(given) if given else 'nothing'} there"
        )
    elif view["opening"]:
        lines.append(
            f"the template prints {view['opening']!r} before a given response; it is context, in generation "
            "too"
        )
    if view["separator"]:
        lines.append(f"white space before a response: {view['separator']!r}, a part of its first token")
    if view["closing"]:
        lines.append(f"white space between a response and its stop token: {view['closing']!r}, context")
    if view["folds_system"]:
        lines.append("the template takes no system message: it is put before the first user message")
    if view["missing_of_tools"] is None:
        lines.append("tools: the template prints offered tools, calls and outputs")
    else:
        lines.append(f"tools: rows with tools are left out: {view['missing_of_tools']}")
    return "\n".join(lines)


def _shown(token: dict[str, Any]) -> str:
    return f"{token['text']!r} ({token['id']})"
