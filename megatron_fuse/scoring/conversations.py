"""Rewards of encoded conversations.

Batches have a token budget, and a prompt that several answers share is read once.

A reward is the output of the head at the conversation's last token, or at the first token of an encoder. The
last token is counted here. transformers would look for a pad id, which may be absent, or be the stop token or
part of the text. A reward depends on its own conversation alone: other rows of the batch, and a shared
prompt, change it only by rounding.

    a row read alone     prompt answer · · ·              padded on the right
    a shared prompt      · · prompt | answer · · ·        the prompt is padded on the left, so that each
                                                          answer begins directly
                                                          behind it: the distances between tokens, which ALiBi
                                                          models use, stay right
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from megatron_fuse import ragged
from megatron_fuse.huggingface.loading import input_device, refuse_unknown_ids
from megatron_fuse.progress import Report, silent
from megatron_fuse.scoring.reward_models import RewardModel
from megatron_fuse.sources.batching import token_budget_batches
from megatron_fuse.sources.row_cache import cache_argument, keeps_keys_and_values

# A prompt is shared only if that saves this share of the group's tokens: two passes cost more than one.
_WORTH = 0.05


@torch.inference_mode()
def score_conversations(
    reward_model: RewardModel,
    groups: Sequence[Sequence[np.ndarray]],
    *,
    batch_tokens: int,
    share_prompts: bool = True,
    report: Report = silent,
) -> list[np.ndarray]:
    """The rewards float32 [K] of every group, in order. A group holds the K conversations of one example.

    groups: each conversation is int32 ids, at most reward_model.max_tokens of them.
    batch_tokens: padded tokens of a forward pass; with shared prompts the tokens whose keys and values are
        held at once.
    report: called after every batch with the conversations that are scored, their tokens, and the share of
        all tokens.

    Raises UserError if a conversation holds an id that the reward model does not have.
    """
    conversations = [ids for group in groups for ids in group]
    if conversations:
        refuse_unknown_ids(
            reward_model.backbone,
            max(int(ids.max()) for ids in conversations),
            f"reward_models.{reward_model.name}",
        )
    share = share_prompts and _can_share(reward_model)
    prompts = np.array([_prompt_length(group) if share else 0 for group in groups], np.int64)
    sizes = [len(group) for group in groups]
    rewards = np.zeros(len(conversations), np.float32)
    lengths = np.array([len(ids) for ids in conversations], np.int64)
    done = tokens = 0

    def scored(rows: np.ndarray) -> None:
        nonlocal done, tokens
        done, tokens = done + len(rows), tokens + int(lengths[rows].sum())
        report(done, tokens, tokens / int(lengths.sum()))

    # First the conversations without a shared prompt, from all groups together.
    alone = np.flatnonzero(np.repeat(prompts, sizes) == 0)
    for batch in token_budget_batches([len(conversations[row]) for row in alone], batch_tokens):
        rows = alone[batch]
        rewards[rows] = _rewards(reward_model, [conversations[row] for row in rows])
        scored(rows)

    # Then the groups with a shared prompt. Half of the budget is for the prompts, half for the rows that are
    # read behind them: both are in memory at once.
    rows_of = ragged.split(np.arange(len(conversations)), sizes)
    shared = np.flatnonzero(prompts)
    longest = np.array([max(len(ids) for ids in groups[group]) for group in shared.tolist()], np.int64)
    for batch in _prompt_batches(prompts[shared], longest, batch_tokens // 2, reward_model.max_tokens):
        chosen = shared[batch]
        rows = np.concatenate([rows_of[group] for group in chosen])
        rewards[rows] = _rewards_behind_prompts(
            reward_model, [groups[group] for group in chosen], prompts[chosen], batch_tokens // 2
        )
        scored(rows)
    return [rewards[rows] for rows in rows_of]


def _can_share(reward_model: RewardModel) -> bool:
    """Whether the model can read the rest of a conversation behind the keys and values of its prompt.

    That needs a causal model that keeps nothing of a prompt but keys and values.
    """
    if not reward_model.causal or cache_argument(reward_model.backbone.forward) is None:
        return False
    config = reward_model.backbone.config
    return isinstance(config, PreTrainedConfig) and keeps_keys_and_values(config)


def _prompt_length(group: Sequence[np.ndarray]) -> int:
    """The length of the common beginning of a group's conversations, 0 if sharing it is not worth while."""
    if len(group) < 2:
        return 0
    # Each conversation keeps at least its last token: the reward is read there.
    shortest = min(len(ids) for ids in group) - 1
    differs = np.any([ids[:shortest] != group[0][:shortest] for ids in group[1:]], axis=0)
    length = int(np.argmax(differs)) if differs.any() else shortest
    saved = (len(group) - 1) * length
    return length if saved >= _WORTH * sum(len(ids) for ids in group) else 0


def _prompt_batches(
    prompts: np.ndarray, longest: np.ndarray, batch_tokens: int, max_tokens: int | None
) -> list[list[int]]:
    """Batches of groups whose prompts are read together: by falling prompt length, at most batch_tokens
    padded tokens each.

    prompts [n]: length of each group's prompt.
    longest [n]: length of each group's longest conversation.

    Together the longest prompt of a batch and the longest rest behind a prompt must fit into max_tokens, even
    if they are of different groups: ALiBi tables end there, and padding counts.
    """
    batches: list[list[int]] = []
    width = rest = 0
    for group in np.argsort(-prompts, kind="stable").tolist():
        rest = max(rest, int(longest[group] - prompts[group]))
        full = not batches or (len(batches[-1]) + 1) * width > batch_tokens
        if full or width + rest > (max_tokens or np.inf):
            batches.append([])
            width, rest = int(prompts[group]), int(longest[group] - prompts[group])
        batches[-1].append(group)
    return batches


def _rewards_behind_prompts(
    reward_model: RewardModel, groups: Sequence[Sequence[np.ndarray]], prompts: np.ndarray, batch_tokens: int
) -> np.ndarray:
    """The rewards float32 of these groups' conversations, concatenated. All prompts, of lengths [groups], are
    read once, together."""
    read = _read_prompts(
        reward_model, [group[0][:length] for group, length in zip(groups, prompts, strict=True)]
    )
    places = ragged.row_numbers([len(group) for group in groups])
    rests = [ids[length:] for group, length in zip(groups, prompts, strict=True) for ids in group]
    rewards = np.zeros(len(rests), np.float32)
    for batch in token_budget_batches([read.mask.shape[1] + len(rest) for rest in rests], batch_tokens):
        rewards[batch] = _rewards(
            reward_model, [rests[row] for row in batch], behind=read.rows(places[batch])
        )
    return rewards


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Prompts after their forward pass, padded on the left: keys and values [n, heads, p, d] by layer, and
    mask int64 [n, p]."""

    cache: DynamicCache
    mask: torch.Tensor

    def rows(self, places: np.ndarray) -> "_Prompts":
        """The prompts at these indices, which may repeat, in a cache of their own."""
        index = torch.from_numpy(places).to(self.mask.device)
        layers = []
        for layer in self.cache.layers:
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
            layers.append(
                (layer.keys[index.to(layer.keys.device)], layer.values[index.to(layer.values.device)])
            )
        return _Prompts(DynamicCache(layers), self.mask[index])


def _read_prompts(reward_model: RewardModel, prompts: Sequence[np.ndarray]) -> _Prompts:
    # The cache has full layers, not the model's own kinds of layers. A sliding layer drops tokens older than
    # its window and counts padding on the left as tokens.
    # The mask already keeps every token within its window.
    cache = DynamicCache()
    tokens, mask = (part.to(input_device(reward_model.backbone)) for part in pad(prompts, "left"))
    _hidden(reward_model, tokens, mask, cache)
    return _Prompts(cache, mask)


def _rewards(
    reward_model: RewardModel,
    rows: Sequence[np.ndarray],
    *,
    padding: Literal["left", "right"] = "right",
    behind: _Prompts | None = None,
) -> np.ndarray:
    """The rewards float32 [n] of one batch.

    behind: the prompts that the rows follow; None: the rows are whole conversations.
    """
    tokens, mask = (part.to(input_device(reward_model.backbone)) for part in pad(rows, padding))
    whole = torch.cat([behind.mask, mask], dim=1) if behind else mask
    hidden = _hidden(reward_model, tokens, whole, behind.cache if behind else None)
    first = mask.argmax(dim=1).to(hidden.device)
    places = first + mask.sum(dim=1).to(hidden.device) - 1 if reward_model.causal else first
    read = hidden[torch.arange(len(rows), device=hidden.device), places]
    return reward_model.head(read.float())[:, 0].cpu().numpy()


def pad(rows: Sequence[np.ndarray], side: Literal["left", "right"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as ids int64 [n, s] and mask int64 [n, s]. Padding has id 0 and mask 0."""
    width = max(len(ids) for ids in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(rows):
        begin = width - len(ids) if side == "left" else 0
        tokens[row, begin : begin + len(ids)] = ids
        mask[row, begin : begin + len(ids)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def _hidden(
    reward_model: RewardModel, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None
) -> torch.Tensor:
    """The last hidden states [n, s, h] of tokens [n, s] behind the tokens of the cache.

    mask [n, cached + s].
    """
    extra: dict[str, torch.Tensor | DynamicCache | bool | None] = {}
    parameters = inspect.signature(reward_model.backbone.forward).parameters
    if reward_model.causal and "position_ids" in parameters:  # ALiBi models take none
        extra["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    if (argument := cache_argument(reward_model.backbone.forward)) is not None:
        extra |= {argument: cache, "use_cache": cache is not None}
    return reward_model.backbone(input_ids=tokens, attention_mask=mask, **extra).last_hidden_state
