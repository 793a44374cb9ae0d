"""Small reward models that learn what a strong judge prefers: three seeds of a Llama of 4.6 million
parameters, from nothing.

    python benchmarks/preference_models.py --answers alpaca_eval.jsonl --tokenizer TOKENIZER.model --output \
        REWARD_MODELS

--answers: JSONL rows {instruction, responses: {model: text}, scores: {judge: {model: score}}}. The loss is
Bradley and Terry's, -log sigmoid(better - worse), over every pair of answers that one judge told apart. Each
model is saved as a one-label classifier with its tokenizer, as FsfairX is, so that a recipe can name it. They
know no language: a floor for what reward models can do, and as slow as real ones are wide.
"""

import argparse
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.errors import exit_code
from megatron_fuse.recipe import RewardModelOptions
from megatron_fuse.scoring.conversations import pad
from megatron_fuse.storage import read_jsonl
from megatron_fuse.tokenization import load_tokenizer

NAMES = ("first", "second", "third")
TEMPLATE = "vicuna_v1.1"
POSITIONS = 2048
_SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Training:
    epochs: int = 3
    lr: float = 1e-3
    rows_per_step: int = 4
    most_tokens: int = 640  # of a conversation that is learned from; longer ones are left out of the training


def options_of(directory: Path) -> RewardModelOptions:
    """The options by which a recipe names the reward model in a directory."""
    return RewardModelOptions(model=str(directory), dtype="fp32", chat_template=TEMPLATE)


def train_reward_models(
    output: Path, tokenizer: Path, rows: Sequence[dict[str, Any]], training: Training = Training()
) -> dict[str, Path]:
    """Name -> directory of every reward model."""
    chat = load_chat_format(load_tokenizer(tokenizer), TEMPLATE)
    groups = [group for row in rows if (group := _comparisons(chat, row, training.most_tokens))]
    directories = {}
    for seed, name in enumerate(NAMES):
        model = _trained(chat, groups, training, seed)
        directories[name] = output / name
        model.save_pretrained(directories[name])
        shutil.copy(tokenizer, directories[name])
    return directories


@dataclass(frozen=True)
class _Comparisons:
    """An instruction's conversations, int32 ids each, and the pairs (better, worse) of their places."""

    conversations: list
    pairs: list[tuple[int, int]]


def _comparisons(chat: ChatFormat, row: dict[str, Any], most_tokens: int) -> _Comparisons | None:
    messages = [{"role": "user", "content": row["instruction"]}]
    ids = {
        model: chat.encode_conversation(messages, text).ids
        for model, text in row["responses"].items()
        if any(model in scores for scores in row["scores"].values())
    }
    kept = [model for model in ids if len(ids[model]) <= most_tokens]
    pairs = set()
    for scores in row["scores"].values():
        for one, two in combinations([model for model in kept if model in scores], 2):
            if scores[one] != scores[two]:
                better, worse = (one, two) if scores[one] > scores[two] else (two, one)
                pairs.add((kept.index(better), kept.index(worse)))
    return _Comparisons([ids[model] for model in kept], sorted(pairs)) if pairs else None


def _trained(chat: ChatFormat, groups: Sequence[_Comparisons], training: Training, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=chat.tokenizer.vocab_size,
        max_position_embeddings=POSITIONS,
        num_labels=1,
        pad_token_id=None,
        **_SIZES,
    )
    model: Any = LlamaForSequenceClassification(config)
    batches = list(_batches(groups, training, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, len(batches), pct_start=0.1)
    for batch in batches:
        tokens, mask = pad([ids for group in batch for ids in group.conversations], "right")
        hidden = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        rewards = model.score(hidden[torch.arange(len(tokens)), mask.sum(1) - 1])[:, 0]
        by_group = rewards.split([len(group.conversations) for group in batch])
        better, worse = (
            torch.cat(
                [
                    group_rewards[[pair[side] for pair in group.pairs]]
                    for group, group_rewards in zip(batch, by_group, strict=True)
                ]
            )
            for side in (0, 1)
        )
        loss = -torch.nn.functional.logsigmoid(better - worse).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _batches(groups: Sequence[_Comparisons], training: Training, seed: int) -> Iterator[list[_Comparisons]]:
    order, draw = list(groups), random.Random(seed)
    for _ in range(training.epochs):
        draw.shuffle(order)
        for start in range(0, len(order), training.rows_per_step):
            yield order[start : start + training.rows_per_step]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="file of a tokenizer")
    parser.add_argument(
        "--output", type=Path, required=True, help="output directory, with one directory per reward model"
    )
    options = parser.parse_args()
    rows = [row for _, row in read_jsonl(options.answers)]
    for name, directory in train_reward_models(options.output, options.tokenizer, rows).items():
        print(f"{name}: {directory}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
