"""Special-token strings in a user's texts, hidden while a chat template is rendered: only the template's own become special ids."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_fuse.chat.nested_texts import with_texts
from megatron_fuse.tokenization import Tokenizer


class HiddenStrings:
    """Replaces special-token strings in texts by private characters that the texts do not contain, and back.

    mark: one more such character, for what is to be found again in a rendered template.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        names = [text for text, token in tokenizer.added_tokens.items() if token in tokenizer.special_ids and text]
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
        """A message with its texts hidden, the thought and the calls of tools among them."""
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
