"""What a chat template prints around a response: found out by rendering two short conversations.

A template prints a response that is given (a finished conversation) and one that is still to come (the generation prompt) in two
ways, and the two need not agree: after the generation prompt of a reasoning model a thought begins (`<think>`), before a given
response its template prints none, or an empty one. A response is learned, and measured, where the template prints it.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron_fuse.chat.thoughts import open_thought
from megatron_fuse.errors import UserError
from megatron_fuse.tokenization import Tokenizer

Turns = list[dict[str, str]]

_MARKER = "RESPONSE9d41c7e2"
_NEXT_MARKER = "QUESTION9d41c7e2"


@dataclass(frozen=True)
class Surroundings:
    """Texts that a template prints at one response.

    before: what a finished conversation has before the response beyond the generation prompt; after: what it has behind it.
    next_turn: the text between the response and the user's next message. generation: what the generation prompt has beyond the
    text before a given response, as an open `<think>`. If neither `before` nor `generation` is empty, the two texts part there.
    """

    before: str
    generation: str
    after: str
    next_turn: str

    @property
    def separator(self) -> str:
        """ASCII white space before a response: it belongs to the response's first token, not to the prompt."""
        return self.before if not self.before.strip() and self.before.isascii() else ""


def surroundings(render: Callable[..., str], question: Turns, where: str) -> Surroundings:
    """render(turns, prompt=...): the template's text, with the generation prompt or without; question: turns up to the user's.

    Raises UserError where the template does not print the assistant's message. where: the recipe's key, for the error.
    """
    prompt = render(question, prompt=True)
    answered = [*question, {"role": "assistant", "content": _MARKER}]
    context, marker, after = render(answered, prompt=False).partition(_MARKER)
    if not marker:
        raise UserError(f"{where}.chat_template: the template does not print the assistant's message")
    try:
        longer = render([*answered, {"role": "user", "content": _NEXT_MARKER}], prompt=False)
    except UserError:  # for one question only
        longer = ""
    next_turn = longer.partition(_MARKER)[2].partition(_NEXT_MARKER)[0]
    shared = _shared_length(context, prompt)
    # `<think></think>` and `<think>` part at the tag, not behind or within it.
    shared = min(shared, len(prompt) - len(open_thought(prompt)))
    return Surroundings(context[shared:], prompt[shared:], after, next_turn)


def _shared_length(a: str, b: str) -> int:
    """Length of the longest prefix of both."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def end_token(tokenizer: Tokenizer, around: Surroundings, end_ids: Collection[int]) -> tuple[int | None, str]:
    """The token with which the model ends a response, None if it has none; and the white space that the template prints before it.

    The first special or added token that the template prints behind the response. If it prints none there, the one that begins
    the user's next turn, as GLM-4's `<|user|>`; but end_ids, the ends that the model's generation_config.json lists, decide where
    there are any, and BOS ends nothing. Else the tokenizer's EOS.
    """
    found = _first_added(tokenizer, around.after)
    if found is not None:
        return found
    found = _first_added(tokenizer, around.next_turn)
    if found is not None and found[0] != tokenizer.bos_id and (not end_ids or found[0] in end_ids):
        return found
    return tokenizer.eos_id, ""


def _first_added(tokenizer: Tokenizer, text: str) -> tuple[int, str] | None:
    """The first added token in a text, and the text before it if that is ASCII white space."""
    names = sorted((name for name in tokenizer.added_tokens if name.strip()), key=len, reverse=True)
    match = re.search("|".join(map(re.escape, names)) or "(?!)", text)
    if match is None:
        return None
    space = text[: match.start()]
    return tokenizer.added_tokens[match[0]], space if not space.strip() and space.isascii() else ""
