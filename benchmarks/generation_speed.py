"""What batches by token budget and refilled places bring to generation, in tokens of answers a second.

    python benchmarks/generation_speed.py [--source-tokenizer TOKENIZER.model --instructions FILE.jsonl] \
        [--prompts 96]

The model is a random Llama of 42 million parameters with Llama-2's vocabulary. Prompts have the lengths of
real ones, or without a file lengths of a long-tailed distribution. A random model prefers no token: so many
ids are stop tokens that an answer has --answer-tokens tokens on average, of a geometric distribution, and few
come to --max-new-tokens, which nobody knows beforehand.

    one by one      baseline: the same code with a budget of one row
    fixed batches   baseline: `generate` of transformers over 16 prompts at a time in the file's order, padded
                    to the longest; all
                    rows stay until the last one ends. It may hold as many positions as the token budget, on
                    average
    no refilling    baseline: batches by token budget that are over before the next begins
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from table import Measurement, run
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_fuse.chat import load_chat_format
from megatron_fuse.instructions import read_rows
from megatron_fuse.sources.batching import token_budget_batches
from megatron_fuse.sources.generation import Prompt, Sampling, generate
from megatron_fuse.tokenization import load_tokenizer

_FIXED = 16
# Embedding and head are one matrix, as large as all the layers.
_SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source-tokenizer", type=Path, help="directory or file of a tokenizer, for --instructions"
    )
    parser.add_argument(
        "--instructions", type=Path, help="instruction file (JSONL); default: lognormal lengths"
    )
    parser.add_argument(
        "--prompts", type=int, default=96, help="number of prompts, evenly chosen from the whole file"
    )
    parser.add_argument("--answer-tokens", type=int, default=40, help="mean number of tokens of an answer")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="largest number of tokens of an answer"
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        default=1024,
        help="prompts that are longer together with their answers are left out",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="repeated measurements, by turns; the median counts"
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    if (options.source_tokenizer is None) != (options.instructions is None):
        sys.exit("--source-tokenizer needs --instructions, and --instructions needs --source-tokenizer")
    sequences, vocab_size = _real_prompts(options) if options.instructions else _drawn_prompts(options)
    prompts = [Prompt(str(i), ids, options.max_new_tokens, seed=i) for i, ids in enumerate(sequences)]
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=options.seq_length, **_SIZES)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    stop_ids = frozenset(range(3, vocab_size, options.answer_tokens))
    sampling = Sampling(stop_ids, torch.ones(vocab_size, dtype=torch.bool))
    fixed = [prompts[start : start + _FIXED] for start in range(0, len(prompts), _FIXED)]
    lengths = [len(prompt.ids) + prompt.room for prompt in prompts]
    batch_tokens = int(
        np.mean([_FIXED * max(lengths[start : start + _FIXED]) for start in range(0, len(prompts), _FIXED)])
    )

    def generated(batches: Sequence[Sequence[Prompt]], batch_tokens: int) -> int:
        answers = [
            answer
            for batch in batches
            for answer in generate(model, batch, sampling, batch_tokens=batch_tokens)
        ]
        return sum(len(answer.ids) + answer.stopped for answer in answers)

    closed = [[prompts[i] for i in batch] for batch in token_budget_batches(lengths, batch_tokens)]
    generated([prompts[:2]], batch_tokens)  # the first pass of a process is slow
    budget, single, in_file_order, unfilled = _medians(
        options.repeats,
        partial(generated, [prompts], batch_tokens),
        partial(generated, [prompts], 1),
        lambda: sum(_transformers_tokens(model, batch, sampling) for batch in fixed),
        partial(generated, closed, batch_tokens),
    )
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(prompts)} prompts "
        f"of {np.mean([len(prompt.ids) for prompt in prompts]):.0f} tokens "
        f"({max(len(p.ids) for p in prompts)} the longest), {generated([prompts], batch_tokens)} tokens of "
        f"answers, {batch_tokens} positions at once"
    )
    name = "generation by token budget"
    return [
        Measurement(f"{name}, refilled", budget, "tokens/s", "one by one", single, "ratio >= 1.5"),
        Measurement(
            f"{name}, refilled",
            budget,
            "tokens/s",
            "fixed batches in file order",
            in_file_order,
            "ratio >= 1.5",
        ),
        Measurement(f"{name}, refilled", budget, "tokens/s", "no refilling", unfilled),
    ]


def _real_prompts(options: argparse.Namespace) -> tuple[list[list[int]], int]:
    chat = load_chat_format(load_tokenizer(options.source_tokenizer), "vicuna_v1.1")
    examples = list(read_rows(options.instructions).read())
    chosen = np.linspace(0, len(examples) - 1, options.prompts).astype(int).tolist()
    sequences = [
        chat.encode_prompt(examples[index].prompt(chat.system), examples[index].tools) for index in chosen
    ]
    longest = options.seq_length - options.max_new_tokens
    return [ids for ids in sequences if len(ids) <= longest], chat.tokenizer.vocab_size


def _drawn_prompts(options: argparse.Namespace) -> tuple[list[list[int]], int]:
    """Median 55 tokens, 1 in 40 above 320: about what instructions have."""
    vocab_size, random = 32000, np.random.default_rng(0)
    longest = options.seq_length - options.max_new_tokens
    lengths = np.clip(random.lognormal(np.log(55), 0.9, options.prompts), 8, longest).astype(int)
    return [random.integers(3, vocab_size, length).tolist() for length in lengths], vocab_size


def _transformers_tokens(model: LlamaForCausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> int:
    """How many tokens the answers have that transformers itself generates, stop tokens included."""
    width = max(len(prompt.ids) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    whole = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=prompts[0].room,
        eos_token_id=sorted(sampling.stop_ids),
        pad_token_id=0,
    )
    ended = torch.isin(whole[:, width:], torch.tensor(sorted(sampling.stop_ids))).cumsum(1)
    return int((ended.cumsum(1) <= 1).sum())  # up to and with the first stop token


def _medians(repeats: int, *works: Callable[[], int]) -> list[float]:
    """Tokens a second of each, all taken in turns, so that a slow spell of the machine meets all of them."""
    rates = []
    for _ in range(repeats):
        turn = []
        for work in works:
            start = time.perf_counter()
            tokens = work()
            turn.append(tokens / (time.perf_counter() - start))
        rates.append(turn)
    return np.median(rates, axis=0).tolist()


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
