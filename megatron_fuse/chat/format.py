"""Chat templates: from messages and a response to token ids, and to the bytes at which every response token ends.

One mechanism: every template is Jinja text in the form of Hugging Face's `chat_template`, built in or not. A response
itself never goes through Jinja, so that its bytes are the same for every model.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.chat.hidden_strings import HiddenStrings
from megatron_fuse.chat.meter import TemplateLimit
from megatron_fuse.chat.nested_texts import texts_in
from megatron_fuse.chat.probe import end_token, surroundings
from megatron_fuse.chat.templates import TEMPLATES, render
from megatron_fuse.chat.thoughts import thought_end, without_empty_thought
from megatron_fuse.chat.tool_rendering import CallStyle, Tools, best_style, has_tools, not_printed
from megatron_fuse.errors import UserError
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.settings import read_text
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans, response_bytes
from megatron_fuse.tokenization.tokenizer import hash_parts

# {role, content}; of an assistant turn also reasoning_content, its thought, {supervised: false}, its mask, and tool_calls; of a tool's
# turn name and tool_call_id. The forms are those of instructions/examples.py.
Messages = Sequence[Mapping[str, Any]]

_SYSTEM_MARKER = "SYSTEM9d41c7e2"


@dataclass(frozen=True, eq=False)
class EncodedConversation:
    """A conversation as one model meets it.

    ids int32 [n]; supervised bool [n]: the token is a label, of a response or the stop token that ends it. The logits of
    row i - 1 predict token i. spans: where the supervised tokens lie in `response_bytes` of the supervised turns, r rows
    = supervised.sum(). size: bytes of these turns, without those that stand for their ends.
    """

    ids: np.ndarray
    supervised: np.ndarray
    spans: TokenSpans
    size: int

    @property
    def prompt_length(self) -> int:
        """Index of the first supervised token; the number of tokens where there is none."""
        return int(np.argmax(self.supervised)) if len(self.spans) else len(self.ids)

    @property
    def exact(self) -> bool:
        """Whether the tokens spell every byte: none is unknown to the tokenizer, none lost to its normaliser."""
        return self.spans.bytes_spelled == self.size


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """A tokenizer with its chat template; `load_chat_format` makes it and finds all but the first three fields out.

    system: message for examples that have none; None leaves it to the template.
    stop_id: the token that ends a response, a label. end_ids: all tokens at which sampling ends, stop_id among them.
    separator: white space of the template between generation prompt and response. opening: other text there (an empty
    `<think></think>`), which belongs to the prompt. generation: what the generation prompt has beyond the text before a given
    response (an open `<think>`): a response that is generated follows it, one that is given does not.
    closing: white space that the template prints between a response and its stop token; context, not a label.
    folds_system: the template refuses or forgets system messages, so they are put before the first user message.
    origin: where the template comes from, for errors.
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
        return hash_parts(parts + (around if any(around) else []))

    @property
    def opens_thought(self) -> bool:
        """Whether the generation prompt ends in an open thought, so that a generated response begins with one."""
        return thought_end(self.generation) is not None

    @property
    def thought_end(self) -> str | None:
        """The tag that ends the model's thoughts, where the template prints the tag that begins one before a response."""
        return thought_end(self.generation) or thought_end(self.opening)

    @cached_property
    def thought_tags(self) -> dict[int, bytes]:
        """Tags around a thought that are special tokens, which have no bytes of their own: id -> the tag."""
        if self.thought_end is None:
            return {}
        tags = (self.thought_end, self.thought_end.replace("/", "", 1))
        found = {self.tokenizer.added_tokens[tag]: tag.encode() for tag in tags if tag in self.tokenizer.added_tokens}
        return {token: tag for token, tag in found.items() if token in self.tokenizer.special_ids}

    def spelled(self, ids: Sequence[int]) -> bytes:
        """Bytes of generated ids, the tags of thoughts included."""
        if not self.thought_tags:
            return self.tokenizer.joined_bytes(ids)
        return b"".join(self.thought_tags.get(token) or self.tokenizer.joined_bytes([token]) for token in ids)

    def render_prompt(self, messages: Messages, tools: Tools | None = None) -> str:
        """The generation prompt as text; messages end with the user's or a tool's. tools: what is offered, {type: function, function}.

        Raises UserError where the template refuses the messages or does not print what belongs to tools.
        """
        turns = self.with_system(messages)
        self._require_tools_printed(turns, tools)
        return self._generation_prompt(turns, tools)

    def encode_prompt(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Ids of the generation prompt; BOS exactly once if the tokenizer adds one or the template writes one. Raises as above."""
        turns = self.with_system(messages)
        self._require_tools_printed(turns, tools)
        hide = HiddenStrings(self.tokenizer, [*_texts(turns), *texts_in(tools)])
        return self._ids(self._generation_prompt([hide.in_turn(turn) for turn in turns], hide.in_value(tools)), hide)

    def _generation_prompt(self, turns: Messages, tools: Tools | None) -> str:
        return self._render(turns, tools, prompt=True) + ("" if self.generation else self.opening)

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
        """The conversation as the model meets it; messages end with the user's or a tool's.

        stop: the response's end is its end, and its stop token a label. every_turn: the assistant's earlier turns are
        labels too, each with its stop token where the template prints one; else they are context, as turns with tool_calls always
        are. reasoning: the thought before the response, context where the template prints it. tools: what is offered.
        The text before the response is what the template prints there in the finished conversation. An empty thought at its
        end is left out where the response begins with a thought of its own.
        A turn's tokens are those of the whole text up to its end, wherever these begin with the tokens of the text
        before it and spell the turn's bytes; else it continues the text before, as in generation.
        Raises UserError where the template refuses the messages, leaves a supervised turn out, or does not print what belongs to
        tools: an offered one, a call or an output.
        """
        parts, hide = self._parts(messages, response, every_turn, reasoning, tools, cut=not stop)
        ids, supervised, spans = list[int](), list[bool](), list[TokenSpans]()
        text, text_ids, begin = "", list[int](), 0  # begin: of the turn, in the bytes of all supervised turns
        for number, (before, space, turn) in enumerate(parts):
            prompt_ids = self._ids(text + before, hide)
            added = _behind(text_ids, prompt_ids)
            if added is None:
                added = self._ids(before, hide, continued=True)
            stop_place = self._stop_place(added) if number else None
            if stop_place is not None:
                spans.append(_stop_span(self.stop_id, begin - 1))
            supervised += [place == stop_place for place in range(len(added))]
            text += before + hide(space + turn)
            text_ids = self._ids(text, hide)
            answer, answer_spans = self._answer(_behind(prompt_ids, text_ids), space, turn, begin)
            supervised += [True] * len(answer)
            spans.append(answer_spans)
            ids += added + answer
            begin += len(response_bytes([turn]))
        if stop:
            end = [*self._closing_ids(text, text_ids, hide), self.stop_id]
            ids += end
            supervised += [place == len(end) - 1 for place in range(len(end))]
            spans.append(_stop_span(self.stop_id, begin - 1))
        whole = TokenSpans.join(spans, [0] * len(spans))
        return EncodedConversation(np.array(ids, np.int32), np.array(supervised, bool), whole, begin - len(parts))

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the token that ends them, without the template's separator: what encode_conversation takes."""
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
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
        """How the template takes calls of tools, and why it does not print a simple one; None where it does."""

        def rendered(turns: Messages, tools: Tools | None) -> str:
            return self._render(self.with_system(turns), tools, prompt=True, style=CallStyle())

        return best_style(rendered, self.origin)

    @property
    def missing_of_tools(self) -> str | None:
        """Why a simple conversation with tools cannot be read in this template; None where it can."""
        return self._call_style[1]

    def _require_tools_printed(self, turns: Messages, tools: Tools | None) -> None:
        if has_tools(turns, tools):
            missing = not_printed(lambda marked, offered: self._render(marked, offered, prompt=True), turns, tools)
            if missing:
                raise UserError(f"{self.origin} does not print {brief(missing[0])}")

    def _render(
        self, turns: Messages, tools: Tools | None = None, *, prompt: bool, style: CallStyle | None = None
    ) -> str:
        """style: of calls; default the one that the template takes."""
        token = self.tokenizer.token_text
        names = {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id, "pad": self.tokenizer.pad_id}
        specials = {
            f"{name}_token": (token(number) if number is not None else None) or "" for name, number in names.items()
        }
        shown = list(map(_for_template, turns))
        if style is None and has_tools(turns, tools):
            shown = self._call_style[0].shown(shown)
        try:
            return render(self.template, shown, tools or None, add_generation_prompt=prompt, **specials)
        except TemplateLimit as error:
            raise UserError(f"{self.origin} cannot be used, {brief(str(error))}") from error
        except Exception as error:  # a template is a program: it may divide by zero
            said = brief(str(error)) or type(error).__name__
            raise UserError(f"{self.origin} refuses the messages: {said}") from error

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
        """(template text before it, white space, text) of every supervised turn, the response's last; and what hides.

        Special-token strings in messages, turns and tools stay text: they are hidden while the template is rendered, and only
        the template's own become special ids. (Tokens that are not marked special cannot be told apart.) A supervised
        turn does not go through the template at all, which may strip it: a mark holds its place.
        """
        turns = self.with_system(messages)
        self._require_tools_printed(turns, tools)
        hide = HiddenStrings(self.tokenizer, [*_texts(turns), *texts_in(tools), response, reasoning or ""])
        learned = [every_turn and may_be_learned(turn) for turn in turns]
        shown = [
            hide.in_turn(turn) | ({"content": hide.mark} if mark else {})
            for turn, mark in zip(turns, learned, strict=True)
        ]
        thought = {"reasoning_content": hide(reasoning)} if reasoning else {}
        finished = [*shown, {"role": "assistant", "content": hide.mark} | thought]
        texts = self._render(finished, hide.in_value(tools), prompt=False).split(hide.mark)[:-1]
        answers = [turn["content"] for turn, mark in zip(turns, learned, strict=True) if mark] + [response]
        if len(texts) != len(answers):
            raise UserError(
                f"{self.tokenizer.name}: the chat template prints {max(len(texts) - 1, 0)} of the {len(answers) - 1} earlier "
                "assistant turns: choose another chat_template, or set data.supervise to last_turn"
            )
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
        # The generation prompt ends before the white space; nothing separates it from an empty response.
        before, space, _ = parts.pop()
        return [*parts, (before, space if response else "", response)], hide

    def _closing_ids(self, text: str, text_ids: list[int], hide: HiddenStrings) -> list[int]:
        """Ids of the white space that the template prints between this text, the conversation so far, and the stop token."""
        if not self.closing:
            return []
        joint = _behind(text_ids, self._ids(text + self.closing, hide))
        return self._ids(self.closing, hide, continued=True) if joint is None else joint

    def _answer(self, joint: list[int] | None, space: str, turn: str, begin: int) -> tuple[list[int], TokenSpans]:
        """Ids of a turn behind its template's white space (ASCII), and their spans; the turn's first byte is byte `begin`.

        joint: its ids in the whole text, None where they depend on each other; taken if they spell the turn, which
        Unicode normalisation may prevent.
        """
        data = (space + turn).encode()
        if joint is not None and self.tokenizer.joined_bytes(joint) == data:
            ids, ends, lossy = joint, np.cumsum(self.tokenizer.byte_lengths[joint]), np.zeros(len(joint), bool)
        else:
            ids, ends, lossy = self.tokenizer.encode_spans(space + turn)
        ends = np.maximum(ends - len(space), 0).astype(np.int64)
        flags = lossy * np.uint8(SpanFlag.LOSSY)
        flags[:1] |= np.uint8(SpanFlag.LEADING if space else 0)
        starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(ids)]
        return ids, TokenSpans(np.array(ids, np.int32), begin + starts, begin + ends, flags)

    def _stop_place(self, ids: list[int]) -> int | None:
        """Place of the stop token in the template's ids after a turn; None where it does not come first, but for white space."""
        if self.stop_id not in ids:
            return None
        place = ids.index(self.stop_id)
        special = self.tokenizer.special_ids & set(ids[:place])
        return None if special or self.tokenizer.joined_bytes(ids[:place]).strip() else place

    def _ids(self, text: str, hide: HiddenStrings, *, continued: bool = False) -> list[int]:
        """Ids of a text with the template's special tokens; continued: other text stands before it."""
        tokenizer = self.tokenizer
        if not continued and not hide.is_in(text):
            ids = tokenizer.encode(text, special=True)
        else:
            ids = []
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
        """Whether the tokenizer treats text after a special token as the beginning of a text (dummy prefix)."""
        text = self.tokenizer.token_text(self.stop_id) or ""
        return self.tokenizer.encode(text + "a", special=True)[1:] == self.tokenizer.encode("a")


def _texts(turns: Messages) -> list[str]:
    return [text for turn in turns for key, value in turn.items() if key != "role" for text in texts_in(value)]


def _for_template(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message without our own keys; templates call its thought by one of two names."""
    shown = {key: turn[key] for key in ("role", "content", "tool_calls", "name", "tool_call_id") if key in turn}
    thought = turn.get("reasoning_content")
    return shown | ({"reasoning_content": thought, "thinking": thought} if thought else {})


def supervised_turns(messages: Messages, response: str, *, every_turn: bool) -> list[str]:
    """The texts whose bytes `EncodedConversation.spans` counts in."""
    earlier = [message["content"] for message in messages if may_be_learned(message)]
    return [*(earlier if every_turn else []), response]


def may_be_learned(message: Mapping[str, Any]) -> bool:
    """An assistant turn that the data do not mask, as {supervised: false} does, and that calls no tool: models write calls in forms
    of their own, which have no bytes in common."""
    return message["role"] == "assistant" and bool(message.get("supervised", True)) and "tool_calls" not in message


def _behind(before: list[int], ids: list[int]) -> list[int] | None:
    """The ids behind `before`; None where they do not begin with it."""
    return ids[len(before) :] if ids[: len(before)] == before else None


def _stop_span(stop_id: int, end: int) -> TokenSpans:
    """The stop token of a turn that ends at this byte."""
    flag = np.array([SpanFlag.STOP], np.uint8)
    return TokenSpans(np.array([stop_id], np.int32), np.array([end], np.int64), np.array([end + 1], np.int64), flag)


def load_chat_format(
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    system: str | None = None,
    where: str = "target",
    end_ids: Collection[int] = (),
    learns: bool = False,
) -> ChatFormat:
    """Chooses the template (built-in name, path of a .jinja file, None = the tokenizer's own) and tries it once.

    where: the recipe's key for error messages. end_ids: tokens at which the model ends an answer, from its
    generation_config.json. learns: the model is trained on the format, so that a response is to end without `closing`: white
    space that is no label would not be learned. Raises UserError when there is no template, no stop token, or the template loses the response.
    """
    template, origin = _choose_template(tokenizer, chat_template, where)
    stop_id = tokenizer.eos_id if tokenizer.eos_id is not None else -1
    draft = ChatFormat(tokenizer, template, system, stop_id, origin=origin)
    draft = replace(draft, folds_system=_forgets_system(draft))
    question = draft.with_system([{"role": "user", "content": "Question"}])
    around = surroundings(draft._render, question, where)
    # A model that was saved with another family's defaults lists an id that is a piece of text here. No answer ends there.
    ends = tokenizer.special_ids.union(tokenizer.added_tokens.values()).intersection(end_ids)
    stop, closing = end_token(tokenizer, around, ends)
    if stop is None:
        raise UserError(
            f"{where}: {tokenizer.name} has no EOS token and the chat template puts no special token after a response: "
            'set "eos_token" in its tokenizer_config.json (the string of a token in its vocabulary), or choose '
            f"{where}.chat_template so that a response ends in a special token of this tokenizer"
        )
    return replace(
        draft,
        stop_id=stop,
        end_ids=frozenset(token for token in (stop, tokenizer.eos_id, *ends) if token is not None),
        separator=around.separator,
        opening=around.before.removeprefix(around.separator),
        generation=around.generation,
        closing="" if learns else closing,
    )


def _choose_template(tokenizer: Tokenizer, chat_template: str | None, where: str) -> tuple[str, str]:
    """The template's text, and what it is called in errors."""
    known = f"one of {', '.join(TEMPLATES)}, or the path of a .jinja file"
    if chat_template is None:
        if tokenizer.chat_template is None:
            raise UserError(f"{where}: {tokenizer.name} has no chat template: set {where}.chat_template to {known}")
        return tokenizer.chat_template, f"{where}: the chat template of {tokenizer.name}"
    name = f"{where}.chat_template: {chat_template}"
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template], name
    if not Path(chat_template).is_file():
        raise UserError(f"{where}.chat_template: {chat_template!r} is neither {known}")
    return read_text(Path(chat_template), f"{where}.chat_template"), name


def _forgets_system(draft: ChatFormat) -> bool:
    turns = [{"role": "system", "content": _SYSTEM_MARKER}, {"role": "user", "content": "Question"}]
    try:
        return _SYSTEM_MARKER not in draft._render(turns, prompt=True)
    except UserError:
        return True
