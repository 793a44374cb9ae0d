"""Chat formats turn messages and a response into token ids, and say which bytes each token covers.

There is one mechanism: every template, built in or not, is Jinja text in the form of Hugging Face's
`chat_template`. The response itself never goes through Jinja, so its bytes are the same for every model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_fuse.chat.hidden_strings import HiddenStrings
from megatron_fuse.chat.meter import TemplateLimit
from megatron_fuse.chat.nested_texts import texts_in
from megatron_fuse.chat.templates import render
from megatron_fuse.chat.thoughts import thought_end, without_empty_thought
from megatron_fuse.chat.tool_rendering import CallStyle, Tools, best_style, has_tools, not_printed
from megatron_fuse.chat.turns import Messages, for_template, may_be_learned, texts_of
from megatron_fuse.errors import UserError
from megatron_fuse.storage.files import sha256_of_parts
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization import Tokenizer
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


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """A tokenizer with its chat template.

    `load_chat_format` makes it, and finds out all but the first three fields.

    system: the system message of examples that have none; None leaves it to the template.
    stop_id: the token that ends a response; it is a label.
    end_ids: all tokens at which sampling ends; stop_id is one of them.
    separator: white space that the template prints between the generation prompt and a response.
    opening: other text there, such as an empty `<think></think>`. It belongs to the prompt.
    generation: text of the generation prompt that the template does not print before a given response, such
    as an open `<think>`. A generated response follows it; a given response does not.
    closing: white space that the template prints between a response and its stop token. It is context, not a
    label.
    folds_system: the template refuses or ignores system messages, so they are put before the first user
    message.
    origin: the place of the template, for errors.
    """

    tokenizer: Tokenizer
    template: str
    system: str | None
    stop_id: int
    end_ids: frozenset[int] = frozenset()
    separator: str = ""
    opening: str = ""
    generation: str = ""
    closing: str = ""
    folds_system: bool = False
    origin: str = "the chat template"

    @cached_property
    def sha256(self) -> str:
        parts = [self.tokenizer.sha256, self.template, repr(self.system), str(self.stop_id)]
        around = [self.opening, self.generation, self.closing]
        return sha256_of_parts(*parts, *(around if any(around) else []))

    @property
    def opens_thought(self) -> bool:
        """Whether the generation prompt ends in an open thought, so that a generated response begins with
        one.
        """
        return thought_end(self.generation) is not None

    @property
    def thought_end(self) -> str | None:
        """The tag that ends the model's thoughts.

        None if the template prints no opening tag before a response.
        """
        return thought_end(self.generation) or thought_end(self.opening)

    @cached_property
    def thought_tags(self) -> dict[int, bytes]:
        """The tags around a thought that are special tokens: id -> the tag. Special tokens have no bytes."""
        if self.thought_end is None:
            return {}
        tags = (self.thought_end, self.thought_end.replace("/", "", 1))
        added = self.tokenizer.added_tokens
        ids = {added[tag]: tag.encode() for tag in tags if tag in added}
        return {token: tag for token, tag in ids.items() if token in self.tokenizer.special_ids}

    def spelled(self, ids: Sequence[int]) -> bytes:
        """The bytes of generated ids, with the tags of thoughts."""
        if not self.thought_tags:
            return self.tokenizer.joined_bytes(ids)
        return b"".join(self.thought_tags.get(token) or self.tokenizer.joined_bytes([token]) for token in ids)

    def render_prompt(self, messages: Messages, tools: Tools | None = None) -> str:
        """The generation prompt as text. The last message is the user's or a tool's.

        tools: the offered tools, each {type: function, function}.
        Raises UserError if the template refuses the messages, or does not print the tools, calls or outputs.
        """
        turns = self.with_system(messages)
        self._require_tools_printed(turns, tools)
        return self._generation_prompt(turns, tools)

    def encode_prompt(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """The ids of the generation prompt; errors are those of `render_prompt`.

        BOS is there exactly once if the tokenizer adds it or the template writes it.
        """
        turns = self.with_system(messages)
        self._require_tools_printed(turns, tools)
        hide = HiddenStrings(self.tokenizer, [*texts_of(turns), *texts_in(tools)])
        return self._ids(
            self._generation_prompt([hide.in_turn(turn) for turn in turns], hide.in_value(tools)), hide
        )

    def _generation_prompt(self, turns: Messages, tools: Tools | None) -> str:
        return self.render(turns, tools, prompt=True) + ("" if self.generation else self.opening)

    def encode_conversation(
        self,
        messages: Messages,
        response: str,
        *,
        stop: bool = True,
        every_turn: bool = False,
        reasoning: str | None = None,
        tools: Tools | None = None,
    ) -> EncodedConversation:
        """The conversation as the model reads it. The last message is the user's or a tool's.

        stop: the response was not cut off, so its stop token is a label.
        every_turn: the assistant's earlier turns are labels too, each with its stop token if the template
        prints one. Otherwise they are context. Turns with tool_calls are always context.
        reasoning: the thought before the response. It is context, if the template prints it.
        tools: the offered tools.

        The text before the response is what the template prints there in the finished conversation. An empty
        thought at its end is left out if the response begins with a thought of its own.

        The tokens of a turn are taken from the whole text up to its end, if they begin with the tokens of the
        text before it and spell the turn's bytes. Otherwise the turn is tokenized as a continuation of that
        text, as in generation.

        Raises UserError if the template refuses the messages, leaves out a supervised turn, or does not print
        an offered tool, a call or an output.
        """
        parts, hide = self._parts(messages, response, every_turn, reasoning, tools, cut=not stop)
        ids, supervised, spans = list[int](), list[bool](), list[TokenSpans]()
        # `text` is all text so far, and `text_ids` its ids. `begin`
        # is the first byte of the turn in `response_bytes`.
        text, text_ids, begin = "", list[int](), 0
        for number, (before, space, turn) in enumerate(parts):
            # 1. The template's text before the turn. Its ids are what the longer
            # text adds to the ids so far. If the tokenizer joins characters across
            # the border, no such ids exist, and the new text is a continuation.
            prompt_ids = self._ids(text + before, hide)
            added = _behind(text_ids, prompt_ids)
            if added is None:
                added = self._ids(before, hide, continued=True)
            # 2. The stop token of the previous turn is in this text. It covers the zero byte after that turn,
            # which is byte begin - 1.
            stop_index = self._stop_index(added) if number else None
            if stop_index is not None:
                spans.append(_stop_span(self.stop_id, begin - 1))
            supervised += [index == stop_index for index in range(len(added))]
            # 3. The turn itself: all its tokens are labels, also the
            # one that begins in the template's white space.
            text += before + hide(space + turn)
            text_ids = self._ids(text, hide)
            answer, answer_spans = self._answer(_behind(prompt_ids, text_ids), space, turn, begin)
            supervised += [True] * len(answer)
            spans.append(answer_spans)
            ids += added + answer
            begin += len(response_bytes([turn]))
        # The last turn has no later text of the template, so its stop token is added here.
        if stop:
            end = [*self._closing_ids(text, text_ids, hide), self.stop_id]
            ids += end
            supervised += [index == len(end) - 1 for index in range(len(end))]
            spans.append(_stop_span(self.stop_id, begin - 1))
        # The spans are offset by `begin` already. `begin` counts one
        # zero byte per turn, which `size` leaves out.
        whole = TokenSpans.join(spans, [0] * len(spans))
        return EncodedConversation(
            np.array(ids, np.int32), np.array(supervised, bool), whole, begin - len(parts)
        )

    def decode_response(self, ids: Sequence[int]) -> str:
        """The text of generated ids up to their end token, as `encode_conversation` takes it.

        The template's separator, and before an end token its closing, are removed.
        """
        end = next((index for index, token in enumerate(ids) if token in self.end_ids), None)
        text = self.spelled(ids[:end]).decode("utf-8", "replace").removeprefix(self.separator)
        return text if end is None else text.removesuffix(self.closing)

    def with_system(self, messages: Messages) -> list[dict[str, Any]]:
        turns = [dict(message) for message in messages]
        if self.system is not None and (not turns or turns[0]["role"] != "system"):
            turns.insert(0, {"role": "system", "content": self.system})
        if self.folds_system and len(turns) > 1 and turns[0]["role"] == "system":
            system, user = turns[0]["content"], turns[1]["content"]
            turns = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}, *turns[2:]]
        return turns

    @cached_property
    def _call_style(self) -> tuple[CallStyle, str | None]:
        """The form in which the template takes calls; and why it does not print a simple call, or None."""

        def rendered(turns: Messages, tools: Tools | None) -> str:
            return self.render(self.with_system(turns), tools, prompt=True, style=CallStyle())

        return best_style(rendered, self.origin)

    @property
    def missing_of_tools(self) -> str | None:
        """Why this template cannot print a simple conversation with tools; None if it can."""
        return self._call_style[1]

    def _require_tools_printed(self, turns: Messages, tools: Tools | None) -> None:
        if has_tools(turns, tools):
            missing = not_printed(
                lambda marked, offered: self.render(marked, offered, prompt=True), turns, tools
            )
            if missing:
                raise UserError(f"{self.origin} does not print {brief(missing[0])}")

    def render(
        self, turns: Messages, tools: Tools | None = None, *, prompt: bool, style: CallStyle | None = None
    ) -> str:
        """style: the form of calls; by default the one that the template takes."""
        token = self.tokenizer.token_text
        names = {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id, "pad": self.tokenizer.pad_id}
        specials = {
            f"{name}_token": (token(number) if number is not None else None) or ""
            for name, number in names.items()
        }
        shown = list(map(for_template, turns))
        if style is None and has_tools(turns, tools):
            shown = self._call_style[0].shown(shown)
        try:
            return render(self.template, shown, tools or None, add_generation_prompt=prompt, **specials)
        except TemplateLimit as error:
            raise UserError(f"{self.origin} cannot be used: {brief(str(error))}") from error
        except Exception as error:  # a template is a program: it may divide by zero
            reason = brief(str(error)) or type(error).__name__
            raise UserError(f"{self.origin} refuses the messages: {reason}") from error

    def _parts(
        self,
        messages: Messages,
        response: str,
        every_turn: bool,
        reasoning: str | None,
        tools: Tools | None,
        *,
        cut: bool,
    ) -> tuple[list[tuple[str, str, str]], HiddenStrings]:
        """(template text before it, white space, text) of every supervised turn, and the HiddenStrings.

        The response is the last of these turns.
        Strings of special tokens in messages, turns and tools stay text: they are hidden while the template
        is rendered, so that only the template's own strings become special ids. (This is not possible for
        added tokens that are not marked special.) A supervised turn does not go through the template, which
        may strip white space from it: a mark holds its place.
        """
        turns = self.with_system(messages)
        self._require_tools_printed(turns, tools)
        hide = HiddenStrings(self.tokenizer, [*texts_of(turns), *texts_in(tools), response, reasoning or ""])
        # Render once, with a mark for each supervised turn, and cut the text at the marks.
        learned = [every_turn and may_be_learned(turn) for turn in turns]
        shown = [
            hide.in_turn(turn) | ({"content": hide.mark} if mark else {})
            for turn, mark in zip(turns, learned, strict=True)
        ]
        thought = {"reasoning_content": hide(reasoning)} if reasoning else {}
        finished = [*shown, {"role": "assistant", "content": hide.mark} | thought]
        texts = self.render(finished, hide.in_value(tools), prompt=False).split(hide.mark)[:-1]
        answers = [turn["content"] for turn, mark in zip(turns, learned, strict=True) if mark] + [response]
        if len(texts) != len(answers):
            raise UserError(
                f"{self.tokenizer.name}: the chat template prints {max(len(texts) - 1, 0)} of the "
                f"{len(answers) - 1} earlier assistant turns. Choose another chat_template, or set "
                "data.supervise to last_turn."
            )
        # `texts` has the template's text before each answer. What follows the last mark is not needed.
        last = len(answers) - 1
        texts = [
            without_empty_thought(text, answer, cut=cut and number == last)
            for number, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]
        spaces = [self.separator if text.endswith(self.separator) else "" for text in texts]
        parts = [
            (text.removesuffix(space), space, answer)
            for text, space, answer in zip(texts, spaces, answers, strict=True)
        ]
        # The generation prompt ends before the white space. An empty response takes no white space.
        before, space, _ = parts.pop()
        return [*parts, (before, space if response else "", response)], hide

    def _closing_ids(self, text: str, text_ids: list[int], hide: HiddenStrings) -> list[int]:
        """Ids of the white space that the template prints between the conversation so far and the stop token.

        text, text_ids: the conversation so far.
        """
        if not self.closing:
            return []
        joint = _behind(text_ids, self._ids(text + self.closing, hide))
        return self._ids(self.closing, hide, continued=True) if joint is None else joint

    def _answer(
        self, joint: list[int] | None, space: str, turn: str, begin: int
    ) -> tuple[list[int], TokenSpans]:
        """Ids of a turn after the template's white space (ASCII), and their spans.

        begin: the place of the turn's first byte in `response_bytes`. joint: the ids of white space and turn
        in the whole text, None if the tokenizer joins characters across the border. They are used only if
        they spell the turn, which Unicode normalisation may prevent.
        """
        data = (space + turn).encode()
        if joint is not None and self.tokenizer.joined_bytes(joint) == data:
            ids, ends, lossy = (
                joint,
                np.cumsum(self.tokenizer.byte_lengths[joint]),
                np.zeros(len(joint), bool),
            )
        else:
            ids, ends, lossy = self.tokenizer.encode_spans(space + turn)
        # Spans count from the turn's first byte. A token inside the white space becomes empty: it ends at 0.
        ends = np.maximum(ends - len(space), 0).astype(np.int64)
        flags = lossy * np.uint8(SpanFlag.LOSSY)
        flags[:1] |= np.uint8(SpanFlag.LEADING if space else 0)
        starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(ids)]
        return ids, TokenSpans(np.array(ids, np.int32), begin + starts, begin + ends, flags)

    def _stop_index(self, ids: list[int]) -> int | None:
        """Index of the stop token in the template's ids after a turn.

        None if anything but white space comes before it, or if there is none.
        """
        if self.stop_id not in ids:
            return None
        index = ids.index(self.stop_id)
        special = self.tokenizer.special_ids & set(ids[:index])
        return None if special or self.tokenizer.joined_bytes(ids[:index]).strip() else index

    def _ids(self, text: str, hide: HiddenStrings, *, continued: bool = False) -> list[int]:
        """Ids of a text with the template's special tokens. continued: other text comes before it."""
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


def _behind(before: list[int], ids: list[int]) -> list[int] | None:
    """The ids after `before`; None if they do not begin with it."""
    return ids[len(before) :] if ids[: len(before)] == before else None


def _stop_span(stop_id: int, end: int) -> TokenSpans:
    """The span of the stop token of a turn that ends at this byte."""
    flag = np.array([SpanFlag.STOP], np.uint8)
    return TokenSpans(
        np.array([stop_id], np.int32), np.array([end], np.int64), np.array([end + 1], np.int64), flag
    )
