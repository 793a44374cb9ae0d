"""Thoughts of reasoning models: the text before an answer, in `<think>` and `</think>` or other tags."""

import re

_TAG = re.compile(r"\s*(<(think|thinking|thought|reason|reasoning|seed:think)>|\[(THINK)\])")


def thought_end(text: str) -> str | None:
    """The end tag of the thought that begins a text (`</think>` for `<think>`); None without a thought."""
    match = _TAG.match(text)
    if match is None:
        return None
    return f"</{match[2]}>" if match[2] else f"[/{match[3]}]"


def open_thought(text: str) -> str:
    """The opening tag at the end of a text, with the white space after it; "" if there is none."""
    match = re.search(rf"{_TAG.pattern}\s*$", text)
    return text[match.start(1) :] if match else ""


def without_empty_thought(context: str, response: str, *, cut: bool = False) -> str:
    """The text before a response.

    An empty thought at its end is removed if the response has a thought of its own.

    Some templates print `<think></think>` before a given response. A response that itself begins with
    `<think>` would then have two thoughts.
    cut: the response was cut off, perhaps within its thought.
    """
    begin, end = _TAG.match(response), thought_end(response)
    if begin is None or end is None or not (cut or end in response):
        return context
    return re.sub(rf"{re.escape(begin[1])}\s*{re.escape(end)}\s*$", "", context)


def with_thought(thought: str | None, answer: str) -> str:
    """The answer after its thought, in the form of most reasoning models."""
    return answer if thought is None else f"<think>\n{thought}\n</think>\n\n{answer}"


def split_thought(
    text: str, end: str | None = None, *, opened: bool = False, cut: bool = False
) -> tuple[str | None, str]:
    """(the thought, the answer after it) of a generated text. The thought is None if there is none.

    end: the tag that ends the model's thoughts in its chat template. opened: the prompt ends in an open
    thought, so the text up to that tag is the thought. cut: the text was cut off, perhaps within a thought
    that the text itself opened. The answer has no white space at its beginning. It is empty if the thought
    does not end.
    """
    begin, own_end = _TAG.match(text), thought_end(text)
    if begin is not None and own_end is not None and (own_end in text or own_end == end or cut):
        text, end, opened = text[begin.end() :], own_end, True
    if end is None or not (opened or end in text):
        return None, text
    thought, end_tag, answer = text.partition(end)
    return thought.strip(), answer.lstrip() if end_tag else ""
