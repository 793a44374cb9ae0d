"""Chat templates: from messages and a response to token ids, and to the bytes at which every response token ends.

One mechanism: every template is Jinja text in the form of Hugging Face's `chat_template`, built in or not. A response
itself never goes through Jinja, so that its bytes are the same for every model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_fuse.chat_templates import TEMPLATES, render
from megatron_fuse.errors import UserError
from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.tokenizer import hash_parts

Messages = Sequence[Mapping[str, str]]

_MARKER = "RESPONSE9d41c7e2"
_SYSTEM_MARKER = "SYSTEM9d41c7e2"


@dataclass(frozen=True)
class EncodedConversation:
    """ids int32 [n]: prompt, response tokens, and the stop token if `stop`.

    prompt_length: index of the first response token, which the logits of row prompt_length - 1 predict.
    ends int32 [m]: byte offset in the response at which each response token ends, the stop token not included;
    ends[-1] == len(response bytes) when exact. A token inside the template's white space ends at 0.
    exact: False when the tokens' bytes are not the response's; such an example is left out of KL.
    leading: the first response token begins in the template's white space before the response (`▁Sure`).
    """

    ids: np.ndarray
    prompt_length: int
    ends: np.ndarray
    stop: bool
    exact: bool
    leading: bool

    @property
    def starts(self) -> np.ndarray:
        """int32 [m + stop]: byte offset at which the token predicted by each response row begins."""
        starts = np.concatenate([np.zeros(1, np.int32), self.ends])
        return starts if self.stop else starts[:-1]

    @property
    def leading_rows(self) -> np.ndarray:
        """bool [m + stop]: the predicted token begins in the template's white space; true for the first row at most."""
        rows = np.zeros(len(self.starts), dtype=bool)
        rows[:1] = self.leading
        return rows


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """A tokenizer with its chat template; `load_chat_format` makes it and finds the last three fields out.

    system: message for examples that have none; None leaves it to the template.
    separator: white space of the template between generation prompt and response; opening: other text there (an empty
    `<think></think>`), which belongs to the prompt. folds_system: the template refuses or forgets system messages, so
    they are put before the first user message.
    """

    tokenizer: Tokenizer
    template: str
    system: str | None
    stop_id: int
    separator: str = ""
    opening: str = ""
    folds_system: bool = False

    @cached_property
    def sha256(self) -> str:
        return hash_parts([self.tokenizer.sha256, self.template, repr(self.system), str(self.stop_id)])

    def render_prompt(self, messages: Messages) -> str:
        """The generation prompt as text. Raises UserError when the template refuses the messages."""
        return self._render(self._with_system(messages), prompt=True) + self.opening

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Ids of the generation prompt; BOS exactly once if the tokenizer adds one or the template writes one."""
        return self._encode(messages, "")[0]

    def encode_conversation(self, messages: Messages, response: str, *, stop: bool = True) -> EncodedConversation:
        """Ids of prompt and response as the model meets them; messages end with the user's.

        The joint tokenization is taken where it begins with the prompt's ids; else the response continues the prompt's
        ids, as in generation. Also when the joint one changes bytes (Unicode normalisation) and continuing does not.
        """
        space = self.separator if response else ""  # ASCII
        prompt_ids, joint_ids = self._encode(messages, space + response)
        expected = (space + response).encode()

        def exact(ids: list[int]) -> bool:
            return self.tokenizer.joined_bytes(ids) == expected

        answer = joint_ids[len(prompt_ids) :]
        joint = joint_ids[: len(prompt_ids)] == prompt_ids
        if not joint or not exact(answer):
            continued = self.tokenizer.encode_continuation(space + response)
            if not joint or exact(continued):
                answer = continued
        ends = np.cumsum(self.tokenizer.byte_lengths[answer]) - len(space)
        ids = prompt_ids + answer + ([self.stop_id] if stop else [])
        return EncodedConversation(
            ids=np.array(ids, dtype=np.int32),
            prompt_length=len(prompt_ids),
            ends=np.maximum(ends, 0).astype(np.int32),
            stop=stop,
            exact=exact(answer),
            leading=bool(space),
        )

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the stop token, without the template's separator: what encode_conversation takes."""
        ids = list(ids)
        if self.stop_id in ids:
            ids = ids[: ids.index(self.stop_id)]
        return self.tokenizer.decode(ids).removeprefix(self.separator)

    def _with_system(self, messages: Messages) -> list[dict[str, str]]:
        turns = [dict(message) for message in messages]
        if self.system is not None and (not turns or turns[0]["role"] != "system"):
            turns.insert(0, {"role": "system", "content": self.system})
        if self.folds_system and len(turns) > 1 and turns[0]["role"] == "system":
            system, user = turns[0]["content"], turns[1]["content"]
            turns = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}, *turns[2:]]
        return turns

    def _render(self, turns: Messages, *, prompt: bool) -> str:
        token = self.tokenizer.token_text
        names = {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id, "pad": self.tokenizer.pad_id}
        specials = {
            f"{name}_token": (token(number) if number is not None else None) or "" for name, number in names.items()
        }
        try:
            return render(self.template, list(turns), add_generation_prompt=prompt, **specials)
        except Exception as error:  # a template is a program: it may divide by zero
            raise UserError(f"{self.tokenizer.name}: the chat template refuses the messages: {error}") from error

    def _encode(self, messages: Messages, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of prompt and continuation together.

        Special-token strings in messages and continuation stay text: they are hidden while the template is rendered,
        and only the template's own become special ids. (Tokens that are not marked special cannot be told apart.)
        """
        turns = self._with_system(messages)
        hide = _Hidden(self.tokenizer, [*(turn["content"] for turn in turns), continuation])
        text = self._render([turn | {"content": hide(turn["content"])} for turn in turns], prompt=True) + self.opening
        prompt_ids = self._ids(text, hide)
        return prompt_ids, self._ids(text + hide(continuation), hide) if continuation else prompt_ids

    def _ids(self, text: str, hide: "_Hidden") -> list[int]:
        tokenizer = self.tokenizer
        if not hide.used:
            ids = tokenizer.encode(text, special=True)
        else:
            ids = []
            for index, part in enumerate(hide.split(text)):
                if part in tokenizer.added_tokens:
                    ids.append(tokenizer.added_tokens[part])
                elif part:
                    first = index == 0 or self._prefix_after_special
                    ids += (tokenizer.encode if first else tokenizer.encode_continuation)(hide.reveal(part))
        if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
            ids = [tokenizer.bos_id, *ids]
        return ids

    @cached_property
    def _prefix_after_special(self) -> bool:
        """Whether the tokenizer treats text after a special token as the beginning of a text (dummy prefix)."""
        text = self.tokenizer.token_text(self.stop_id) or ""
        return self.tokenizer.encode(text + "a", special=True)[1:] == self.tokenizer.encode("a")


class _Hidden:
    """Replaces special-token strings in texts by private characters that the texts do not contain, and back."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        names = [text for text, token in tokenizer.added_tokens.items() if token in tokenizer.special_ids and text]
        self._names = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        whole = "".join(texts)
        self.used = bool(self._pattern.search(whole))
        free = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in whole)
        self._characters = [next(free) for _ in self._names] if self.used else []

    def __call__(self, text: str) -> str:
        if not self.used:
            return text
        return self._pattern.sub(lambda match: self._characters[self._names.index(match[0])], text)

    def split(self, text: str) -> list[str]:
        return re.split(f"({self._pattern.pattern})", text)

    def reveal(self, text: str) -> str:
        for name, character in zip(self._names, self._characters, strict=True):
            text = text.replace(character, name)
        return text


def load_chat_format(
    tokenizer: Tokenizer, chat_template: str | None = None, system: str | None = None, where: str = "target"
) -> ChatFormat:
    """Chooses the template (built-in name, path of a .jinja file, None = the tokenizer's own) and tries it once.

    where: the recipe's key for error messages. Raises UserError when there is no template, no stop token, or the
    template loses the response.
    """
    template = _choose_template(tokenizer, chat_template, where)
    stop_id = tokenizer.eos_id if tokenizer.eos_id is not None else -1
    draft = ChatFormat(tokenizer, template, system, stop_id)
    draft = replace(draft, folds_system=_forgets_system(draft))
    question = draft._with_system([{"role": "user", "content": "Question"}])
    prompt = draft._render(question, prompt=True)
    whole = draft._render([*question, {"role": "assistant", "content": _MARKER}], prompt=False)
    before, marker, after = whole.partition(_MARKER)
    if not marker:
        raise UserError(f"{where}.chat_template: the template does not print the assistant's message")
    between = before.removeprefix(prompt) if before.startswith(prompt) else ""
    white = not between.strip() and between.isascii()
    stop_id = _first_special(tokenizer, after)
    if stop_id is None:
        raise UserError(
            f"{where}: {tokenizer.name} has no EOS token and the chat template puts no special token after a response: "
            'set "eos_token" in its tokenizer_config.json (the string of a token in its vocabulary), or choose '
            f"{where}.chat_template so that a response ends in a special token of this tokenizer"
        )
    return replace(draft, stop_id=stop_id, separator=between if white else "", opening="" if white else between)


def _choose_template(tokenizer: Tokenizer, chat_template: str | None, where: str) -> str:
    known = f"one of {', '.join(TEMPLATES)}, or the path of a .jinja file"
    if chat_template is None:
        if tokenizer.chat_template is None:
            raise UserError(f"{where}: {tokenizer.name} has no chat template: set {where}.chat_template to {known}")
        return tokenizer.chat_template
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template]
    if not Path(chat_template).is_file():
        raise UserError(f"{where}.chat_template: {chat_template!r} is neither {known}")
    try:
        return Path(chat_template).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}.chat_template: {chat_template} is no UTF-8 text: {error}") from error


def _forgets_system(draft: ChatFormat) -> bool:
    turns = [{"role": "system", "content": _SYSTEM_MARKER}, {"role": "user", "content": "Question"}]
    try:
        return _SYSTEM_MARKER not in draft._render(turns, prompt=True)
    except UserError:
        return True


def _first_special(tokenizer: Tokenizer, after: str) -> int | None:
    """The token that ends a response: the first special or added token that the template prints after it, else EOS."""
    names = sorted((text for text in tokenizer.added_tokens if text.strip()), key=len, reverse=True)
    match = re.search("|".join(map(re.escape, names)) or "(?!)", after)
    return tokenizer.added_tokens[match[0]] if match else tokenizer.eos_id
