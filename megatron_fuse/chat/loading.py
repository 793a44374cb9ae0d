"""The chat format of a model: which template it has, and what an answer ends with."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from megatron_fuse.chat.format import ChatFormat
from megatron_fuse.chat.probe import end_token, surroundings
from megatron_fuse.chat.templates import TEMPLATES
from megatron_fuse.errors import UserError
from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.settings import read_text

_SYSTEM_MARKER = "SYSTEM9d41c7e2"


def load_chat_format(
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    system: str | None = None,
    where: str = "target",
    end_ids: Collection[int] = (),
    learns: bool = False,
) -> ChatFormat:
    """Chooses the template (built-in name, path of a .jinja file, None = the tokenizer's own) and tries it
    once.

    where: the recipe's key, for error messages. end_ids: tokens at which the model ends an answer, from its
    generation_config.json. learns: the model is trained on the format. Then `closing` is left out: it is
    white space that is no label, so the model would not learn to write it before the stop token.
    Raises UserError if there is no template or no stop token, or if the template does not print the response.
    """
    template, origin = _choose_template(tokenizer, chat_template, where)
    stop_id = tokenizer.eos_id if tokenizer.eos_id is not None else -1
    draft = ChatFormat(tokenizer, template, system, stop_id, origin=origin)
    draft = replace(draft, folds_system=_forgets_system(draft))
    question = draft.with_system([{"role": "user", "content": "Question"}])
    around = surroundings(draft.render, question, where)
    # Only special and added tokens count: a model that was saved with the defaults of another family may list
    # an id that is ordinary text here.
    ends = tokenizer.special_ids.union(tokenizer.added_tokens.values()).intersection(end_ids)
    stop, closing = end_token(tokenizer, around, ends)
    if stop is None:
        raise UserError(
            f"{where}: {tokenizer.name} has no EOS token, and the chat template prints no special token "
            'after a response. Set "eos_token" in its tokenizer_config.json to the string of a token in its '
            f"vocabulary. Or set {where}.chat_template to a template that ends a response with a special "
            "token of this tokenizer."
        )
    return replace(
        draft,
        stop_id=stop,
        end_ids=frozenset(token for token in (stop, tokenizer.eos_id, *ends) if token is not None),
        separator=around.separator,
        opening=around.before.removeprefix(around.separator),
        generation=around.generation,
        closing="" if learns else closing,
    )


def _choose_template(tokenizer: Tokenizer, chat_template: str | None, where: str) -> tuple[str, str]:
    """The template's text, and its name in errors."""
    known = f"one of {', '.join(TEMPLATES)}, or the path of a .jinja file"
    if chat_template is None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{where}: {tokenizer.name} has no chat template. Set {where}.chat_template to {known}."
            )
        return tokenizer.chat_template, f"{where}: the chat template of {tokenizer.name}"
    name = f"{where}.chat_template: {chat_template}"
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template], name
    if not Path(chat_template).is_file():
        raise UserError(
            f"{where}.chat_template: {chat_template!r} is not a known template and not a file. Set it to "
            f"{known}."
        )
    return read_text(Path(chat_template), f"{where}.chat_template"), name


def _forgets_system(draft: ChatFormat) -> bool:
    turns = [{"role": "system", "content": _SYSTEM_MARKER}, {"role": "user", "content": "Question"}]
    try:
        return _SYSTEM_MARKER not in draft.render(turns, prompt=True)
    except UserError:
        return True
