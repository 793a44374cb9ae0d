"""Applies `data.normalize`, `data.strip` and `data.reasoning` to an example's texts.

This happens once, before any model reads them.
"""

import unicodedata
from dataclasses import dataclass, replace
from typing import Final

from megatron_fuse.chat import may_be_learned
from megatron_fuse.chat.nested_texts import with_texts
from megatron_fuse.chat.thoughts import with_thought
from megatron_fuse.instructions.examples import Example, Message

_FORM: Final = "NFC"


@dataclass(frozen=True)
class Cleaning:
    nfc: bool  # every text gets Unicode's composed form
    strip: bool  # white space around the assistant's texts is removed
    # Thoughts are kept apart for the templates ("template"), dropped
    # ("drop"), or written into the supervised texts ("supervise").
    reasoning: str = "template"

    def __call__(self, example: Example) -> Example:
        if not (self.nfc or self.strip) and self.reasoning == "template":
            return example
        text, thought = self._answer(example.response), example.reasoning and self._text(example.reasoning)
        return replace(
            example,
            system=example.system and self._text(example.system),
            messages=[self._message(message) for message in example.messages],
            response=with_thought(thought, text) if self.reasoning == "supervise" else text,
            reasoning=thought if self.reasoning == "template" else None,
            tools=with_texts(example.tools, self._text),
        )

    def _message(self, message: Message) -> Message:
        if message["role"] != "assistant":
            return with_texts(message, self._text)
        clean: Message = {**message, "content": self._answer(message["content"])}
        if "tool_calls" in message:
            clean["tool_calls"] = with_texts(message["tool_calls"], self._text)
        thought = clean.pop("reasoning_content", None)
        if thought is not None and self.reasoning == "template":
            clean["reasoning_content"] = self._text(thought)
        elif thought is not None and self.reasoning == "supervise" and may_be_learned(message):
            clean["content"] = with_thought(self._text(thought), clean["content"])
        return clean

    def _answer(self, text: str) -> str:
        return self._text(text.strip() if self.strip else text)

    def _text(self, text: str) -> str:
        return unicodedata.normalize(_FORM, text) if self.nfc else text


def is_in_nfc(example: Example) -> bool:
    """Whether all texts of the assistant are in NFC.

    Other texts go through the tokenizer's own normaliser anyway.
    """
    answers = [message["content"] for message in example.messages if message["role"] == "assistant"]
    return all(unicodedata.is_normalized(_FORM, text) for text in (*answers, example.response))
