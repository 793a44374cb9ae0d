"""Checks that source models read and answer on a GPU as on a CPU, and measures the time that capture adds,
and the rates of reading and of decoding.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_fuse.capture.distributions import SparseRows
from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.capture.shards import Conversation
from megatron_fuse.chat import EncodedConversation
from megatron_fuse.gpu_checks.clock import free_memory, seconds_in_turns
from megatron_fuse.gpu_checks.rows import Row, held, measured, measured_or_held, not_run
from megatron_fuse.gpu_checks.synthetic import LLAMA_1B, LLAMA_TINY, recipe_of_random_target
from megatron_fuse.planning.sizes import size_of
from megatron_fuse.sources.batching import token_budget_batches
from megatron_fuse.sources.generation import Prompt, Sampling, generate
from megatron_fuse.tokenization.spans import TokenSpans

_POSITIONS = 2048  # most tokens that a model can read
_BATCH_TOKENS = 16384
# Two devices add fp32 numbers in different orders. The logits of the small model have a standard deviation of
# about 1.
_ROUNDING = 1e-3


def run(device: str, directory: Path) -> Iterator[Row]:
    yield from _equal_rows(device, directory)
    yield from _equal_answers(device)
    free_memory(device)
    try:
        yield from _of_large_model(device, directory)
    except torch.OutOfMemoryError:
        yield not_run("capture and decoding by a large model", "out of memory")


def random_model(sizes: dict[str, Any], device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model with random weights. They are so large that the attended tokens decide the next token."""
    torch.manual_seed(3)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(**sizes, max_position_embeddings=_POSITIONS, initializer_range=0.2)
        )
    return model.to(dtype).eval().requires_grad_(False)


def _both(device: str) -> list[LlamaForCausalLM]:
    """The same model twice: on the CPU and on the device."""
    on_cpu = random_model(LLAMA_TINY, "cpu", torch.float32)
    on_device = LlamaForCausalLM(on_cpu.config).eval().requires_grad_(False)
    on_device.load_state_dict(on_cpu.state_dict())
    return [on_cpu, on_device.to(device)]


def random_conversations(lengths: Sequence[int], vocab_size: int) -> list[Conversation]:
    """Conversations of random ids. Three quarters of the tokens are supervised."""
    draw = np.random.default_rng(5)
    conversations = []
    for number, length in enumerate(lengths):
        ids = draw.integers(0, vocab_size, length).astype(np.int32)
        supervised = np.arange(length) >= length // 4
        bounds = np.arange(supervised.sum())
        spans = TokenSpans(ids[supervised], bounds, bounds + 1, np.zeros(len(bounds), np.uint8))
        conversations.append(
            Conversation(str(number), EncodedConversation(ids, supervised, spans, len(bounds)))
        )
    return conversations


def random_reader(directory: Path, model: LlamaForCausalLM, sizes: dict[str, Any]) -> SourceReader:
    recipe = recipe_of_random_target(directory, sizes, _POSITIONS, capture={"batch_tokens": _BATCH_TOKENS})
    return SourceReader(recipe, "source", model)


def _equal_rows(device: str, directory: Path) -> Iterator[Row]:
    conversations = random_conversations(range(20, 84, 2), LLAMA_TINY["vocab_size"])
    here, there = (
        SparseRows.join(random_reader(directory / str(index), model, LLAMA_TINY).read(conversations))
        for index, model in enumerate(_both(device))
    )
    alike = here.counts == there.counts
    yield held("capture: rows that keep as many entries as on the CPU", float(alike.mean()), "", ">= 0.99")
    ids, logits = ([_of_rows(rows, field, alike) for rows in (here, there)] for field in ("ids", "logits"))
    yield held("capture: entries of the same id", float((ids[0] == ids[1]).mean()), "", ">= 0.99")
    same = ids[0] == ids[1]
    yield held(
        "capture: largest difference of a logit",
        _largest(logits[0][same], logits[1][same]),
        "",
        f"<= {_ROUNDING}",
    )
    yield held(
        "capture: largest difference of a log-sum-exp", _largest(here.lse, there.lse), "", f"<= {_ROUNDING}"
    )


def _of_rows(rows: SparseRows, field: str, chosen: np.ndarray) -> np.ndarray:
    """A field of the entries of some rows. chosen bool [rows]."""
    return getattr(rows, field)[np.repeat(chosen, rows.counts)]


def _largest(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def _equal_answers(device: str) -> Iterator[Row]:
    vocab_size = LLAMA_TINY["vocab_size"]
    draw = np.random.default_rng(7)
    prompts = [
        Prompt(
            str(number),
            draw.integers(3, vocab_size, 5 + number % 7).tolist(),
            room=8 + number % 9,
            seed=number,
        )
        for number in range(32)
    ]
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sampling = Sampling(frozenset({2}), torch.ones(vocab_size, dtype=torch.bool), temperature, top_p=0.95)
        here, there = (generate(model, prompts, sampling, batch_tokens=128) for model in _both(device))
        same = np.mean([one == other for one, other in zip(here, there, strict=True)])
        yield held(f"generation, {name}: answers as on the CPU", float(same), "", ">= 0.9")


def _of_large_model(device: str, directory: Path) -> Iterator[Row]:
    sizes, count, longest = (LLAMA_1B, 64, 1024) if device == "cuda" else (LLAMA_TINY, 8, 64)
    model = random_model(sizes, device, torch.bfloat16 if device == "cuda" else torch.float32)
    yield from cost_of_capture(device, directory, model, sizes, count, longest)
    yield from cost_of_decoding(device, model)


def cost_of_capture(
    device: str, directory: Path, model: LlamaForCausalLM, sizes: dict[str, Any], count: int, longest: int
) -> Iterator[Row]:
    """Captures `count` conversations of up to `longest` tokens, beside a bare forward pass over them."""
    lengths = np.linspace(longest // 8, longest, count).astype(int).tolist()
    conversations = random_conversations(lengths, sizes["vocab_size"])
    reader = random_reader(directory / "large", model, sizes)
    batches = token_budget_batches([length - 1 for length in lengths], _BATCH_TOKENS)
    captured, bare = seconds_in_turns(
        device,
        3,
        lambda: reader.capture_shard(conversations),
        lambda: [
            _forward(model, [conversations[index].readable.ids for index in batch]) for batch in batches
        ],
    )
    name = f"capture, {sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    yield measured(name, sum(lengths) / captured, "tokens/s")
    supervised = sum(int(conversation.readable.supervised.sum()) for conversation in conversations)
    flops = sum(size_of(model.config).forward_flops(length, length, 0) for length in lengths)
    flops += 2 * size_of(model.config).head * supervised
    yield measured("capture: rate", flops / captured / 1e12, "TFLOP/s")
    yield measured_or_held(
        f"{name}: time over a bare forward pass", captured / bare, "", "<= 1.15", counts=device == "cuda"
    )


def cost_of_decoding(device: str, model: LlamaForCausalLM, rows: int = 32) -> Iterator[Row]:
    """Answers of two lengths to the same prompts: the difference is that of the steps between."""
    draw = np.random.default_rng(9)
    vocab_size, layers = model.config.vocab_size, model.config.num_hidden_layers
    prompts = [draw.integers(3, vocab_size, 64).tolist() for _ in range(rows)]
    sampling = Sampling(frozenset(), torch.ones(vocab_size, dtype=torch.bool))

    def answer(room: int) -> None:
        chosen = [Prompt(str(number), ids, room, seed=number) for number, ids in enumerate(prompts)]
        generate(model, chosen, sampling, batch_tokens=rows * (64 + room))

    long, short = seconds_in_turns(device, 3, lambda: answer(65), lambda: answer(1))
    step = (long - short) / 64
    yield measured("generation: speed", rows / step, "tokens/s")
    yield measured("generation: a layer of a step", 1e3 * step / layers, "ms")


@torch.inference_mode()
def _forward(model: LlamaForCausalLM, sequences: Sequence[np.ndarray]) -> None:
    """A bare forward pass of a padded batch. The logits are not kept."""
    width = max(map(len, sequences)) - 1
    tokens, mask = torch.zeros(2, len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence) - 1] = torch.from_numpy(sequence[:-1])
        mask[row, : len(sequence) - 1] = 1
    model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
