"""The parts of a rendered conversation become token ids, labels, and the places of the labels."""

from dataclasses import dataclass

import numpy as np

from megatron_fuse.chat.hidden_strings import HiddenStrings
from megatron_fuse.chat.template_ids import TemplateTokenizer
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans, response_bytes


@dataclass(frozen=True, eq=False)
class EncodedConversation:
    """A conversation as one model reads it.

    ids int32 [n]. supervised bool [n]: whether the token is a label, that is, a token of a response or the
    stop token that ends it. The logits of row i - 1 predict token i.
    spans: the places of the supervised tokens in `response_bytes` of the supervised turns; r =
    supervised.sum() rows. size: bytes of these turns, without the zero bytes that stand for their ends.
    """

    ids: np.ndarray
    supervised: np.ndarray
    spans: TokenSpans
    size: int

    @property
    def prompt_length(self) -> int:
        """Index of the first supervised token; the number of tokens if there is none."""
        return int(np.argmax(self.supervised)) if len(self.spans) else len(self.ids)

    @property
    def exact(self) -> bool:
        """Whether the tokens spell every byte.

        They do if no byte is unknown to the tokenizer or changed by its normaliser.
        """
        return self.spans.bytes_spelled == self.size


class ConversationEncoder:
    """Encodes a conversation from its first supervised turn to its last.

    The tokens of a turn are taken from the whole text up to its end, if they begin with the tokens of the
    text before it and spell the turn's bytes. Otherwise the turn is tokenized as a continuation of that text,
    as in generation.

    hide: what is hidden in the template's texts.
    """

    def __init__(self, template: TemplateTokenizer, hide: HiddenStrings) -> None:
        self._template, self._tokenizer, self._hide = template, template.tokenizer, hide
        self._ids, self._supervised, self._spans = list[int](), list[bool](), list[TokenSpans]()
        self._text, self._text_ids = "", list[int]()  # all text so far, and its ids
        self._turns = 0
        self._begin = 0  # the place of the next turn's first byte in `response_bytes`

    def add_turn(self, before: str, space: str, turn: str) -> None:
        """Adds a supervised turn. before, space: the template's text before it, and white space (ASCII)."""
        # 1. The template's text before the turn, with the stop token of the previous turn in it.
        prompt_ids = self._template.encode(self._text + before, self._hide)
        added = self._added(before, prompt_ids)
        stop_index = self._stop_index(added) if self._turns else None
        self._add_context(added, stop_index)
        # 2. The turn itself: all its tokens are labels, also the
        # one that begins in the template's white space.
        self._text += before + self._hide(space + turn)
        self._text_ids = self._template.encode(self._text, self._hide)
        ids, spans = self._answer(_behind(prompt_ids, self._text_ids), space, turn)
        self._ids += ids
        self._supervised += [True] * len(ids)
        self._spans.append(spans)
        self._begin += len(response_bytes([turn]))
        self._turns += 1

    def add_stop(self, closing: str) -> None:
        """Adds the stop token of the last turn, which no later text of the template has.

        closing: white space that the template prints before it.
        """
        ids: list[int] = []
        if closing:
            ids = self._added(closing, self._template.encode(self._text + closing, self._hide))
        self._add_context([*ids, self._template.stop_id], len(ids))

    def encoded(self) -> EncodedConversation:
        # The spans are offset by their turn's `_begin` already. It counts one
        # zero byte per turn, which `size` leaves out.
        spans = TokenSpans.join(self._spans, [0] * len(self._spans))
        return EncodedConversation(
            np.array(self._ids, np.int32),
            np.array(self._supervised, bool),
            spans,
            self._begin - self._turns,
        )

    def _added(self, further: str, whole_ids: list[int]) -> list[int]:
        """Ids of further text of the template: what they are in the whole text.

        If the tokenizer joins characters across the border, no such ids exist, and the further text is
        tokenized as a continuation. whole_ids: the ids of the text so far and the further text together.
        """
        added = _behind(self._text_ids, whole_ids)
        return self._template.encode(further, self._hide, continued=True) if added is None else added

    def _add_context(self, ids: list[int], stop_index: int | None) -> None:
        """Adds ids that are no labels, except the stop token of the turn before them at stop_index."""
        self._ids += ids
        self._supervised += [index == stop_index for index in range(len(ids))]
        if stop_index is not None:
            # The stop token covers the zero byte after its turn, which is byte begin - 1.
            self._spans.append(_stop_span(self._template.stop_id, self._begin - 1))

    def _stop_index(self, ids: list[int]) -> int | None:
        """Index of the stop token in the template's ids after a turn.

        None if anything but white space comes before it, or if there is none.
        """
        if self._template.stop_id not in ids:
            return None
        index = ids.index(self._template.stop_id)
        special = self._tokenizer.special_ids & set(ids[:index])
        return None if special or self._tokenizer.joined_bytes(ids[:index]).strip() else index

    def _answer(self, joint: list[int] | None, space: str, turn: str) -> tuple[list[int], TokenSpans]:
        """Ids of a turn after the template's white space, and their spans.

        joint: the ids of white space and turn in the whole text, None if the tokenizer joins characters
        across the border. They are used only if they spell the turn, which Unicode normalisation may prevent.
        """
        data = (space + turn).encode()
        if joint is not None and self._tokenizer.joined_bytes(joint) == data:
            ids, ends, lossy = (
                joint,
                np.cumsum(self._tokenizer.byte_lengths[joint]),
                np.zeros(len(joint), bool),
            )
        else:
            ids, ends, lossy = self._tokenizer.encode_spans(space + turn)
        # Spans count from the turn's first byte. A token inside the white space becomes empty: it ends at 0.
        ends = np.maximum(ends - len(space), 0).astype(np.int64)
        flags = lossy * np.uint8(SpanFlag.LOSSY)
        flags[:1] |= np.uint8(SpanFlag.LEADING if space else 0)
        starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(ids)]
        return ids, TokenSpans(np.array(ids, np.int32), self._begin + starts, self._begin + ends, flags)


def _behind(before: list[int], ids: list[int]) -> list[int] | None:
    """The ids after `before`; None if they do not begin with it."""
    return ids[len(before) :] if ids[: len(before)] == before else None


def _stop_span(stop_id: int, end: int) -> TokenSpans:
    """The span of the stop token of a turn that ends at this byte."""
    flag = np.array([SpanFlag.STOP], np.uint8)
    return TokenSpans(
        np.array([stop_id], np.int32), np.array([end], np.int64), np.array([end + 1], np.int64), flag
    )
