"""What it saves a reward model to read the prompt that K answers share only once.

    python benchmarks/scoring_speed.py --reward-model-tokenizer TOKENIZER.model --answers FILE.jsonl \
        [--examples 10]

FILE.jsonl has rows {instruction, responses: {model: answer}} of real answers. The reward model is a random
Llama of 48 million parameters.

    shared prompts    conversations a second. Baseline: every conversation read as a whole, in batches of
                      neighbours in length
    ideal             tokens of the whole conversations over those of the prompts and what follows them: no
                      padding, and every
                      token costs the same

Instructions as people type them are short beside the answers; `--context` adds so many tokens before each, as
system messages, examples or earlier turns do.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from table import Measurement, medians_in_turns, run
from transformers import LlamaConfig, LlamaModel

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.scoring.conversations import score_conversations
from megatron_fuse.scoring.reward_models import RewardModel
from megatron_fuse.storage import read_jsonl
from megatron_fuse.tokenization import load_tokenizer

# 48 million parameters. Wide and of few layers, so that attention is a small part of the work (a tenth at 700
# tokens), as it is in a model of 7 billion (a thirtieth): what attends to a shared prompt costs the same as
# before.
_SIZES = {"hidden_size": 896, "intermediate_size": 2400, "num_hidden_layers": 2, "num_attention_heads": 14}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reward-model-tokenizer", type=Path, required=True, help="directory or file of a tokenizer"
    )
    parser.add_argument(
        "--answers", type=Path, required=True, help="JSONL of instructions with the answers of several models"
    )
    parser.add_argument(
        "--examples", type=int, default=10, help="number of examples, evenly chosen from the whole file"
    )
    parser.add_argument(
        "--answers-each", type=int, nargs="+", default=[3, 8], help="numbers of answers per example (K)"
    )
    parser.add_argument(
        "--context", type=int, nargs="+", default=[0, 384], help="tokens before each instruction"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, help="tokens per forward pass, with padding"
    )
    parser.add_argument("--seq-length", type=int, default=2048, help="longer conversations are left out")
    parser.add_argument(
        "--repeats", type=int, default=3, help="repeated measurements, by turns; the median counts"
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The project wants at least 0.85 of the ideal ratio, and never a loss that counts."""
    chat = load_chat_format(load_tokenizer(options.reward_model_tokenizer), "vicuna_v1.1")
    reward_model = _reward_model(chat, options.seq_length)
    measurements = []
    for answers in options.answers_each:
        for context in options.context:
            groups = _groups(chat, options, answers, context)

            def score(share: bool, groups: list = groups) -> None:
                score_conversations(
                    reward_model, groups, batch_tokens=options.batch_tokens, share_prompts=share
                )

            # The first pass is slow.
            score_conversations(reward_model, groups[:1], batch_tokens=options.batch_tokens)
            shared, plain = medians_in_turns(options.repeats, lambda: score(True), lambda: score(False))
            conversations, ideal = sum(map(len, groups)), _ideal(groups)
            name = f"K={answers}, context {context}"
            wanted = f"ratio >= {max(0.85 * ideal, 0.97):.3g}"
            measurements += [
                Measurement(
                    f"{name}: shared prompts",
                    conversations / shared,
                    "conversations/s",
                    "read whole",
                    conversations / plain,
                    wanted,
                ),
                Measurement(f"{name}: ideal", ideal, "times fewer tokens"),
            ]
    return measurements


def _reward_model(chat: ChatFormat, positions: int) -> RewardModel:
    torch.manual_seed(0)
    backbone = LlamaModel(
        LlamaConfig(vocab_size=chat.tokenizer.vocab_size, max_position_embeddings=positions, **_SIZES)
    )
    head = torch.nn.Linear(_SIZES["hidden_size"], 1, bias=False).requires_grad_(False)
    backbone.eval().requires_grad_(False)
    print(f"{sum(parameter.numel() for parameter in backbone.parameters()):,} parameters")
    return RewardModel("reward", backbone, head, chat, stop=True, causal=True)


def _groups(
    chat: ChatFormat, options: argparse.Namespace, answers: int, context: int
) -> list[list[np.ndarray]]:
    """Conversations of `answers` models each.

    The context is random tokens: the speed does not depend on them.
    """
    random = np.random.default_rng(0)
    rows = [row for _, row in read_jsonl(options.answers)]
    groups = []
    for place in np.linspace(0, len(rows) - 1, options.examples).astype(int):
        messages = [{"role": "user", "content": rows[place]["instruction"]}]
        texts = [text for text in rows[place]["responses"].values() if text and text.strip()][:answers]
        before = random.integers(0, chat.tokenizer.vocab_size, context).astype(np.int32)
        group = [np.concatenate([before, chat.encode_conversation(messages, text).ids]) for text in texts]
        groups.append([ids for ids in group if len(ids) <= options.seq_length])
    lengths = [len(ids) for group in groups for ids in group]
    prompts = [len(chat.encode_prompt([{"role": "user", "content": row["instruction"]}])) for row in rows]
    print(
        f"K={answers}, context {context}: {len(lengths)} conversations of {len(groups)} examples, "
        f"{np.mean(lengths):.0f} tokens each, of which the prompt {np.mean(prompts) + context:.0f}"
    )
    return groups


def _ideal(groups: list[list[np.ndarray]]) -> float:
    whole = read = 0
    for group in groups:
        whole += sum(map(len, group))
        common = next(
            (n for n, ids in enumerate(zip(*group, strict=False)) if len(set(ids)) > 1), min(map(len, group))
        )
        read += sum(map(len, group)) - (len(group) - 1) * common
    return whole / read


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
