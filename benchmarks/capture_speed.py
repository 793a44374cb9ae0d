"""What capture costs over a bare forward pass, and what sorting by length under a token budget saves.

    python benchmarks/capture_speed.py --source-tokenizer TOKENIZER.model --instructions FILE.jsonl \
        [--examples 176]

The model is a random Llama of about 50 million parameters: a larger one, as sources are, leaves less to what
capture adds. Texts, and so lengths, are real.

    capture     seconds over a shard. Baseline: a bare forward pass of the same model over the same batches,
                which makes the logits
                of every padded position and throws them away
    sorting     tokens a second of capture in length-sorted batches under the token budget. Baseline: batches
                of a fixed number of
                examples in the file's order, which hold as many padded tokens on average
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from table import Measurement, medians_in_turns, run
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_fuse.capture import Conversation
from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.capture.stage import conversation_of
from megatron_fuse.chat import load_chat_format
from megatron_fuse.instructions import read_rows
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.sources.batching import token_budget_batches
from megatron_fuse.tokenization import load_tokenizer

# 51 million parameters. Embedding and head are one matrix, so that the head's share of the work (a third) is
# not much larger still: in a model of 7 billion it is a fiftieth.
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 11, "num_attention_heads": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source-tokenizer", type=Path, required=True, help="directory or file of a tokenizer"
    )
    parser.add_argument("--instructions", type=Path, required=True, help="instruction file (JSONL)")
    parser.add_argument(
        "--examples", type=int, default=176, help="number of examples, evenly chosen from the whole file"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, help="tokens per forward pass, with padding"
    )
    parser.add_argument("--seq-length", type=int, default=1024, help="longer conversations are left out")
    parser.add_argument(
        "--repeats", type=int, default=3, help="repeated measurements, by turns; the median counts"
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The project wants capture in at most 1.15 times the bare pass, and sorting at least 1.5 times as
    fast as the file's order.
    """
    chat = load_chat_format(load_tokenizer(options.source_tokenizer), "vicuna_v1.1")
    conversations = read_conversations(chat, options)
    sizes = {"vocab_size": chat.tokenizer.vocab_size, "max_position_embeddings": options.seq_length, **SIZES}
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    reader = SourceReader(capture_recipe(options), "source", model)
    ids = [conversation.encoded.ids[:-1] for conversation in conversations]
    lengths = np.array([len(tokens) for tokens in ids])
    budgeted = token_budget_batches(lengths.tolist(), options.batch_tokens)
    padded = [len(batch) * lengths[batch].max() for batch in budgeted]
    fixed = _fixed_batches(lengths, float(np.mean(padded)))

    def in_file_order() -> None:
        for batch in fixed:
            reader.read([conversations[index] for index in batch])

    reader.read(conversations[:2])  # the first pass of a process is slow
    captured, bare, unsorted = medians_in_turns(
        options.repeats,
        lambda: reader.capture_shard(conversations),
        lambda: [_forward(model, [ids[index] for index in batch]) for batch in budgeted],
        in_file_order,
    )
    tokens = int(lengths.sum())
    rows = sum(len(conversation.encoded.spans) for conversation in conversations)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters:,} parameters, {len(ids)} conversations, {tokens} tokens, {rows} of them supervised; "
        f"padded tokens in a batch: {np.mean(padded):.0f} sorted, "
        f"{np.mean([len(b) * lengths[b].max() for b in fixed]):.0f} in the file's order"
    )
    return [
        Measurement("capture of a shard", captured, "s", "bare padded forward pass", bare, "ratio <= 1.15"),
        Measurement(
            "capture, sorted under a budget",
            tokens / captured,
            "tokens/s",
            "fixed batches in file order",
            tokens / unsorted,
            "ratio >= 1.5",
        ),
    ]


def read_conversations(chat, options: argparse.Namespace) -> list[Conversation]:
    """In the file's order."""
    examples = list(read_rows(options.instructions).read())
    chosen = np.linspace(0, len(examples) - 1, options.examples).astype(int).tolist()
    conversations = [conversation_of(chat, examples[index], None, every_turn=True) for index in chosen]
    return [c for c in conversations if c.encoded is not None and len(c.encoded.ids) <= options.seq_length]


def capture_recipe(options: argparse.Namespace) -> Recipe:
    """The defaults of capture; the files that it names are not read."""
    model = {"model": "none"}
    return make_recipe(
        {
            "workdir": "none",
            "target": model,
            "sources": {"source": model},
            "data": {"path": str(options.instructions)},
            "schedule": {"preset": "fuse"},
            "training": {"seq_length": options.seq_length},
            "capture": {"batch_tokens": options.batch_tokens},
        }
    )


def _fixed_batches(lengths: np.ndarray, padded_tokens: float) -> list[np.ndarray]:
    """Batches of one size, in order: of all sizes the one whose batches hold nearest to so many padded
    tokens on average.
    """

    def batches(size: int) -> list[np.ndarray]:
        return np.split(np.arange(len(lengths)), np.arange(size, len(lengths), size))

    def distance(size: int) -> float:
        return abs(
            float(np.mean([len(batch) * lengths[batch].max() for batch in batches(size)])) - padded_tokens
        )

    return batches(min(range(1, len(lengths) + 1), key=distance))


@torch.inference_mode()
def _forward(model: LlamaForCausalLM, sequences: Sequence[np.ndarray]) -> None:
    width = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    model(input_ids=tokens, attention_mask=mask, use_cache=False)


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
