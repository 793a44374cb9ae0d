"""Finds out what a chat template prints around a response, by rendering short conversations.

The text before a response has two forms: in a finished conversation with a given response, and in the
generation prompt for a response that is still to come. The two may differ. The generation prompt of a
reasoning model may open a thought (`<think>`), while before a given response the template prints no thought,
or an empty one. A response is learned and measured in the place where the template prints a given response.
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
    """Texts that a template prints around one response.

    before: the text before the response in a finished conversation, without its common beginning with the
    generation prompt. after: the text after the response in a finished conversation.
    next_turn: the text between the response and the user's next message.
    generation: the rest of the generation prompt after the common beginning, such as an open `<think>`. If
    neither `before` nor `generation` is empty, the two texts differ from there on.
    """

    before: str
    generation: str
    after: str
    next_turn: str

    @property
    def separator(self) -> str:
        """ASCII white space before a response.

        It belongs to the response's first token, not to the prompt.
        """
        return self.before if not self.before.strip() and self.before.isascii() else ""


def surroundings(render: Callable[..., str], question: Turns, where: str) -> Surroundings:
    """The surroundings of a response to a question.

    render(turns, prompt=...): the template's text, with or without the generation prompt. question: the
    turns; the last is the user's. where: the recipe's key, for the error.
    Raises UserError if the template does not print the assistant's message.
    """
    prompt = render(question, prompt=True)
    answered = [*question, {"role": "assistant", "content": _MARKER}]
    context, marker, after = render(answered, prompt=False).partition(_MARKER)
    if not marker:
        raise UserError(
            f"{where}.chat_template: the template does not print the assistant's message. Choose another "
            "template."
        )
    try:
        longer = render([*answered, {"role": "user", "content": _NEXT_MARKER}], prompt=False)
    except UserError:  # the template takes only one question
        longer = ""
    next_turn = longer.partition(_MARKER)[2].partition(_NEXT_MARKER)[0]
    shared = _shared_length(context, prompt)
    # If one text has `<think></think>` and the other `<think>`, the
    # common beginning ends before the tag, not in it.
    shared = min(shared, len(prompt) - len(open_thought(prompt)))
    return Surroundings(context[shared:], prompt[shared:], after, next_turn)


def _shared_length(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next(
        (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def end_token(tokenizer: Tokenizer, around: Surroundings, end_ids: Collection[int]) -> tuple[int | None, str]:
    """The token that ends a response, None if there is none; and the template's white space before it.

    The choice is the first of these that exists:
    1. the first special or added token that the template prints after the response; 2. the first such token
    of the user's next turn, for example GLM-4's `<|user|>`. It must not be BOS, and must be one
       of end_ids (the end tokens in the model's generation_config.json) if there are any;
    3. the tokenizer's EOS.
    """
    end = _first_added(tokenizer, around.after)
    if end is not None:
        return end
    end = _first_added(tokenizer, around.next_turn)
    if end is not None and end[0] != tokenizer.bos_id and (not end_ids or end[0] in end_ids):
        return end
    return tokenizer.eos_id, ""


def _first_added(tokenizer: Tokenizer, text: str) -> tuple[int, str] | None:
    """The first added token in a text, and the text before it if that is ASCII white space."""
    names = sorted((name for name in tokenizer.added_tokens if name.strip()), key=len, reverse=True)
    match = re.search("|".join(map(re.escape, names)) or "(?!)", text)
    if match is None:
        return None
    space = text[: match.start()]
    return tokenizer.added_tokens[match[0]], space if not space.strip() and space.isascii() else ""
