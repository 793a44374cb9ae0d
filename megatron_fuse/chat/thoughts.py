"""Thoughts of reasoning models: the text between `<think>` and `</think>`, or another pair of such tags, before an answer."""

import re

_TAG = re.compile(r"\s*(<(think|thinking|thought|reason|reasoning|seed:think)>|\[(THINK)\])")


def thought_end(text: str) -> str | None:
    """The tag that ends the thought with which a text begins (`</think>` for `<think>`); None where it begins with none."""
    match = _TAG.match(text)
    if match is None:
        return None
    return f"</{match[2]}>" if match[2] else f"[/{match[3]}]"


def open_thought(text: str) -> str:
    """The tag in which a text ends, but for white space, with that white space; "" where it ends in none."""
    match = re.search(rf"{_TAG.pattern}\s*$", text)
    return text[match.start(1) :] if match else ""


def without_empty_thought(context: str, response: str, *, cut: bool = False) -> str:
    """The text before a response, without the empty thought at its end if the response brings a thought of its own.

    Templates print `<think></think>` before a given response. One that begins with `<think>` itself would get a second thought.
    cut: the response was cut off, perhaps within its thought.
    """
    begin, end = _TAG.match(response), thought_end(response)
    if begin is None or end is None or not (cut or end in response):
        return context
    return re.sub(rf"{re.escape(begin[1])}\s*{re.escape(end)}\s*$", "", context)


def with_thought(thought: str | None, answer: str) -> str:
    """The answer with its thought in front, as most reasoning models write it."""
    return answer if thought is None else f"<think>\n{thought}\n</think>\n\n{answer}"


def split_thought(
    text: str, end: str | None = None, *, opened: bool = False, cut: bool = False
) -> tuple[str | None, str]:
    """(the thought, the answer behind it) of what a model wrote; the thought is None where there is none.

    end: the tag that ends the model's thoughts, as its chat template has it. opened: the prompt ends in an open thought, so that
    all is thought up to that tag. cut: the text was cut off, perhaps within a thought that it begins itself. The answer has no
    white space at its beginning, and is empty where the thought does not end.
    """
    begin, own = _TAG.match(text), thought_end(text)
    if begin is not None and own is not None and (own in text or own == end or cut):
        text, end, opened = text[begin.end() :], own, True
    if end is None or not (opened or end in text):
        return None, text
    thought, found, answer = text.partition(end)
    return thought.strip(), answer.lstrip() if found else ""
