"""The common interface of all forms of reward models, and the text that they read."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from megatron_fuse.chat import ChatFormat, Messages
from megatron_fuse.chat.templates import render
from megatron_fuse.chat.tool_rendering import Tools
from megatron_fuse.huggingface.limits import longest_text

_PADDED = " Answer "


@dataclass(frozen=True, eq=False)
class RewardFormat:
    """How a reward model reads conversations.

    stop: whether a conversation ends with the stop token; else it ends with the answer's last token.
    """

    chat: ChatFormat
    stop: bool

    def encode(self, messages: Messages, response: str, tools: Tools | None = None) -> np.ndarray:
        """The ids of a conversation, int32 [n], with one BOS if the tokenizer adds or the template prints
        one.

        messages end with a message of the user or of a tool. Strings of special tokens within the texts stay
        text, so that the last token always belongs to the template or to the answer. Raises UserError if the
        template refuses the messages or does not print the parts of tools.
        """
        answer = response.strip() if self._strips_answers else response
        return self.chat.encode_conversation(messages, answer, stop=self.stop, tools=tools).ids

    @cached_property
    def _strips_answers(self) -> bool:
        """Whether the template itself strips the answer, as Llama 3's does. Such a reward model was trained
        without the white space.

        `encode_conversation` keeps a response as it is.
        That is right for models whose distributions are compared.
        """
        turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _PADDED}]
        if self.chat.system and not self.chat.folds_system:
            turns.insert(0, {"role": "system", "content": self.chat.system})
        specials = {"bos_token": "", "eos_token": "", "pad_token": ""}
        return _PADDED not in render(self.chat.template, turns, None, add_generation_prompt=False, **specials)


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A reward model with its own tokenizer and chat template.

    backbone: takes input_ids and attention_mask [b, s] and returns last_hidden_state [b, s, h], in the
        recipe's dtype.
    head: [.., h] -> [.., 1], both fp32: bf16 could not distinguish the rewards of two good answers.
    stop: see RewardFormat.
    causal: whether the reward is read at the last token; an encoder's is read at its first token.
    """

    name: str
    backbone: nn.Module
    head: nn.Module
    chat: ChatFormat
    stop: bool
    causal: bool

    @cached_property
    def max_tokens(self) -> int | None:
        return longest_text(self.backbone)

    @cached_property
    def format(self) -> RewardFormat:
        return RewardFormat(self.chat, self.stop)

    def encode(self, messages: Messages, response: str, tools: Tools | None = None) -> np.ndarray:
        """RewardFormat.encode"""
        return self.format.encode(messages, response, tools)
