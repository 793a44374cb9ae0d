"""Hides strings of special tokens in a user's texts while a chat template is rendered.

So only the template's own strings become special ids.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_fuse.chat.nested_texts import with_texts
from megatron_fuse.tokenization import Tokenizer


class HiddenStrings:
    """Replaces strings of special tokens in texts by private characters, and back.

    The texts do not contain these characters.

    mark: one more such character. It holds the place of a text that must be found again in a rendered
    template.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        names = [
            text for text, token in tokenizer.added_tokens.items() if token in tokenizer.special_ids and text
        ]
        self._names = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        whole = "".join(texts)
        used = bool(self._pattern.search(whole))
        free = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in whole)
        self.mark = next(free)
        self._characters = [next(free) for _ in self._names] if used else []

    def __call__(self, text: str) -> str:
        if not self._characters:
            return text
        return self._pattern.sub(lambda match: self._characters[self._names.index(match[0])], text)

    def in_turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """A message with its texts hidden, also its thought and its calls of tools."""
        return {key: value if key == "role" else self.in_value(value) for key, value in turn.items()}

    def in_value(self, value: Any) -> Any:
        """A JSON value with all its texts hidden."""
        return with_texts(value, self) if self._characters else value

    def is_in(self, text: str) -> bool:
        """Whether something is hidden in this text."""
        return any(character in text for character in self._characters)

    def split(self, text: str) -> list[str]:
        return re.split(f"({self._pattern.pattern})", text)

    def reveal(self, text: str) -> str:
        for name, character in zip(self._names, self._characters, strict=False):
            text = text.replace(character, name)
        return text
