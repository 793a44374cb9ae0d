"""Reward models: one number for a conversation, the same whatever shares its batch.

The form of FsfairX-LLaMA3-RM and its kin: a sequence classifier with one label over a language model, which reads the
conversation in its own chat template, and whose reward is the head's output at the last token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from megatron_fuse.chat import ChatFormat, Messages
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import RewardModelOptions
from megatron_fuse.sources.huggingface import load_format, load_model, max_positions, refuse_unknown_ids


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A judge with its own tokenizer and chat template."""

    name: str
    model: Any
    chat: ChatFormat

    @property
    def max_tokens(self) -> int | None:
        return max_positions(self.model.config)

    def encode(self, messages: Messages, response: str) -> np.ndarray:
        """int32 [n]: ids of the conversation with the stop token, BOS at most once, special strings of the text as text."""
        return self.chat.encode_conversation(messages, response).ids

    def score(self, conversations: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
        """float32 [n] rewards of encoded conversations, in their order.

        Batches are of neighbours in length. The head reads the last real token by our own count: transformers looks for a pad
        id, which may be absent, the stop token itself, or part of the text.
        """
        scores = np.zeros(len(conversations), dtype=np.float32)
        order = np.argsort([len(ids) for ids in conversations], kind="stable")
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            scores[indices] = self._score_batch([conversations[index] for index in indices])
        return scores

    @torch.inference_mode()
    def _score_batch(self, conversations: Sequence[np.ndarray]) -> np.ndarray:
        refuse_unknown_ids(self.model, max(int(ids.max()) for ids in conversations), f"reward_models.{self.name}")
        device = self.model.get_input_embeddings().weight.device
        lengths = torch.tensor([len(ids) for ids in conversations])
        tokens = torch.zeros(len(conversations), int(lengths.max()), dtype=torch.long)
        for row, ids in enumerate(conversations):
            tokens[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.long)
        mask = (torch.arange(tokens.shape[1])[None, :] < lengths[:, None]).long()
        tokens, mask = tokens.to(device), mask.to(device)
        if not hasattr(
            self.model, "score"
        ):  # an encoder reads at its first token, which padding on the right leaves alone
            return self.model(input_ids=tokens, attention_mask=mask).logits[:, 0].float().cpu().numpy()
        hidden = self.model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state  # [b, s, h]
        last = hidden[torch.arange(len(lengths), device=device), lengths.to(device) - 1]
        return self.model.score(last)[:, 0].float().cpu().numpy()


def load_reward_model(options: RewardModelOptions, name: str) -> RewardModel:
    """Loads a judge of the recipe. Raises UserError unless it is a sequence classifier with one label and trained weights."""
    where = f"reward_models.{name}"
    model = load_model(AutoModelForSequenceClassification, options, where=where)
    if model.config.num_labels != 1:
        raise UserError(
            f"{where}.model: {options.model} has {model.config.num_labels} labels, a reward model has 1: "
            "name a one-label sequence classifier"
        )
    return RewardModel(name, model, load_format(options, where))
