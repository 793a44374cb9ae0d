"""Token ids of a rendered template: its own strings of special tokens become their ids, those of a user's
texts stay text.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_fuse.chat.hidden_strings import HiddenStrings
from megatron_fuse.tokenization import Tokenizer


@dataclass(frozen=True, eq=False)
class TemplateTokenizer:
    """A tokenizer for the texts of a template. stop_id: the token that ends a response."""

    tokenizer: Tokenizer
    stop_id: int

    def encode(self, text: str, hide: HiddenStrings, *, continued: bool = False) -> list[int]:
        """Ids of a text with the template's special tokens.

        BOS is there exactly once if the tokenizer adds it or the template writes it. hide: what is hidden in
        the text. continued: other text comes before it.
        """
        tokenizer = self.tokenizer
        if not continued and not hide.is_in(text):
            ids = tokenizer.encode(text, special=True)
        else:
            ids = []
            # Hidden strings must not become special ids: each piece
            # between special tokens is tokenized as plain text.
            for index, part in enumerate(hide.split(text)):
                if part in tokenizer.added_tokens:
                    ids.append(tokenizer.added_tokens[part])
                elif part:
                    first = self._prefix_after_special if index else not continued
                    ids += (tokenizer.encode if first else tokenizer.encode_continuation)(hide.reveal(part))
        bos = tokenizer.bos_id
        if tokenizer.adds_bos and bos is not None and not continued and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    @cached_property
    def _prefix_after_special(self) -> bool:
        """Whether the tokenizer treats text after a special token as the beginning of a text (dummy
        prefix).
        """
        text = self.tokenizer.token_text(self.stop_id) or ""
        return self.tokenizer.encode(text + "a", special=True)[1:] == self.tokenizer.encode("a")
