"""What every form of reward model comes down to."""

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
class RewardModel:
    """A judge with its own tokenizer and chat template.

    backbone: called with input_ids and attention_mask [b, s] it gives last_hidden_state [b, s, h], in the recipe's dtype.
    head: [.., h] -> [.., 1], both fp32: rewards of good answers lie closer together than bf16 can tell apart.
    stop: a conversation ends in the stop token, where the reward is read; else in the answer's last token.
    causal: the reward is read at the last token; False for an encoder, which is read at its first.
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

    def encode(self, messages: Messages, response: str, tools: Tools | None = None) -> np.ndarray:
        """int32 [n]: ids of the conversation, with one BOS if the tokenizer adds or the template prints any; messages end
        with the user's or a tool's. Special-token strings of the texts stay text, so that the last token is always the template's or
        the answer's own. Raises UserError where the template refuses the messages or does not print what belongs to tools.
        """
        answer = response.strip() if self._strips_answers else response
        return self.chat.encode_conversation(messages, answer, stop=self.stop, tools=tools).ids

    @cached_property
    def _strips_answers(self) -> bool:
        """Whether the template itself would strip the answer, as Llama 3's does: its judge never met the white space.

        `encode_conversation` keeps a response as it is, which is right for the models whose distributions are compared.
        """
        turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _PADDED}]
        if self.chat.system and not self.chat.folds_system:
            turns.insert(0, {"role": "system", "content": self.chat.system})
        specials = {"bos_token": "", "eos_token": "", "pad_token": ""}
        return _PADDED not in render(self.chat.template, turns, None, add_generation_prompt=False, **specials)
