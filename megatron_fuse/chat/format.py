"""Chat formats turn messages and a response into token ids, and say which bytes each token covers.

There is one mechanism: every template, built in or not, is Jinja text in the form of Hugging Face's
`chat_template`. The response itself never goes through Jinja, so its bytes are the same for every model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_fuse.chat.encoding import ConversationEncoder, EncodedConversation
from megatron_fuse.chat.hidden_strings import HiddenStrings
from megatron_fuse.chat.meter import TemplateLimit
from megatron_fuse.chat.nested_texts import texts_in
from megatron_fuse.chat.template_ids import TemplateTokenizer
from megatron_fuse.chat.templates import render
from megatron_fuse.chat.thoughts import thought_end, without_empty_thought
from megatron_fuse.chat.tool_rendering import CallStyle, Tools, best_style, has_tools, not_printed
from megatron_fuse.chat.turns import Messages, for_template, may_be_learned, texts_of
from megatron_fuse.errors import UserError
from megatron_fuse.storage.files import sha256_of_parts
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization import Tokenizer


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
        prompt = self._generation_prompt([hide.in_turn(turn) for turn in turns], hide.in_value(tools))
        return self._template_tokenizer.encode(prompt, hide)

    @cached_property
    def _template_tokenizer(self) -> TemplateTokenizer:
        return TemplateTokenizer(self.tokenizer, self.stop_id)

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

        Raises UserError if the template refuses the messages, leaves out a supervised turn, or does not print
        an offered tool, a call or an output.
        """
        parts, hide = self._parts(messages, response, every_turn, reasoning, tools, cut=not stop)
        encoder = ConversationEncoder(self._template_tokenizer, hide)
        for before, space, turn in parts:
            encoder.add_turn(before, space, turn)
        if stop:
            encoder.add_stop(self.closing)
        return encoder.encoded()

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
