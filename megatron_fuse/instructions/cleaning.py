"""What `data.normalize` and `data.strip` do to an example's texts: once, before any model reads them."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_fuse.instructions.examples import Example, Message

_FORM = "NFC"


@dataclass(frozen=True)
class Cleaning:
    nfc: bool  # every text in Unicode's composed form
    strip: bool  # no white space around what the assistant says

    def __call__(self, example: Example) -> Example:
        if not (self.nfc or self.strip):
            return example
        return replace(
            example,
            system=example.system and self._text(example.system),
            messages=[self._message(message) for message in example.messages],
            response=self._answer(example.response),
        )

    def _message(self, message: Message) -> Message:
        clean: Callable[[str], str] = self._answer if message["role"] == "assistant" else self._text
        return {**message, "content": clean(message["content"])}

    def _answer(self, text: str) -> str:
        return self._text(text.strip() if self.strip else text)

    def _text(self, text: str) -> str:
        return unicodedata.normalize(_FORM, text) if self.nfc else text


def is_in_nfc(example: Example) -> bool:
    """Whether all that the assistant says is in NFC. (The other texts reach a model through its tokenizer's own normaliser.)"""
    answers = [message["content"] for message in example.messages if message["role"] == "assistant"]
    return all(unicodedata.is_normalized(_FORM, text) for text in (*answers, example.response))
