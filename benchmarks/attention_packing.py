"""What attention without scores in memory saves at 2048 tokens, and what packing saves on conversations of
real lengths.

    python benchmarks/attention_packing.py --target-tokenizer TOKENIZER.model --instructions FILE.jsonl

All on the local path, in fp32. The model is a Llama of random weights; texts, and so lengths, are real.

    attention   forward and backward pass of one layer's core attention over one sequence of --seq-length
                tokens. Baseline: Megatron's
                DotProductAttention, which holds the scores. Memory is the resident set's peak above what was
                held before the call
    documents   attention over the documents of a packed sequence, one by one as we do it. Baseline: one call
                of torch's
                scaled_dot_product_attention under a block-diagonal mask
    packing     tokens of conversations a second of whole training steps: plan, collation, forward and
                backward pass, AdamW. Baseline:
                the same examples, one a sequence, padded to the longest of their step as the trainer does it
    padding     positions of these sequences without a token, a share
"""

import argparse
import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from synthetic_captures import synthetic_run
from table import Measurement, medians_in_turns, run
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.attention import CausalAttention, causal_attention
from megatron_fuse.model.config import transformer_config
from megatron_fuse.model.gpt import FusionGPTModel, build_model
from megatron_fuse.runtime import start_runtime, stop_runtime
from megatron_fuse.stages import Context
from megatron_fuse.training.batches import GlobalBatch, micro_batches, plan_batch
from megatron_fuse.training.loss import make_forward_step

# 11 million parameters, of which the embedding, which is also the head, has 8. The loss leaves out positions
# without label, and so costs nothing in padding: the larger a model is beside its vocabulary, the more
# packing saves.
_VOCABULARY = 32000
_SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
_HEADS, _HEAD_DIM = 8, 64  # of the attention that is measured alone
_WEIGHTS = {"training": (1.0, 0.5)}
_MEBIBYTE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-tokenizer", type=Path, required=True, help="directory or file of a tokenizer"
    )
    parser.add_argument("--instructions", type=Path, required=True, help="instruction file (JSONL)")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument(
        "--global-batch-size", type=int, default=128, help="examples per step; default: that of the recipes"
    )
    parser.add_argument(
        "--steps", type=int, default=1, help="steps with other examples, padded and packed by turns"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="attention: repeated measurements, by turns; the median counts"
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The project wants at least twice the tokens a second from packing, and attention that costs less
    than Megatron's.
    """
    start_runtime()
    with tempfile.TemporaryDirectory() as directory:
        dataset = _dataset(Path(directory), options)
        found = _attention(options) + _documents(dataset, options) + _packing(dataset, options)
    stop_runtime()
    return found


def _dataset(directory: Path, options: argparse.Namespace) -> FusionDataset:
    """The instructions' conversations with drawn teacher's rows."""
    examples, tokenizer = options.steps * options.global_batch_size, options.target_tokenizer
    recipe = synthetic_run(
        directory, tokenizer, {"source": tokenizer}, options.instructions, examples=examples
    )
    build_fusion_data(Context(recipe))
    return FusionDataset(recipe)


def _attention(options: argparse.Namespace) -> list[Measurement]:
    sizes = {"hidden_size": _HEADS * _HEAD_DIM, "num_attention_heads": _HEADS}
    config = transformer_config(read_architecture(LlamaConfig(**sizes)), transformer_impl="local")
    ours, megatrons = (
        of(config, 1, AttnMaskType.causal, "self") for of in (CausalAttention, DotProductAttention)
    )
    tensors = _random_tensors(options.seq_length)

    def work(core: torch.nn.Module, tensors: Sequence[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(core(*tensors, attention_mask=None).sum(), tensors)

    memory = []
    for core in (ours, megatrons):
        work(core, _random_tensors(16))()  # what the first call of a process brings with it
        memory.append(_peak_memory(work(core, tensors)))
    seconds = medians_in_turns(options.repeats, work(ours, tensors), work(megatrons, tensors))
    name, baseline = f"attention over {options.seq_length} tokens", "DotProductAttention"
    return [
        Measurement(f"{name}: time", 1e3 * seconds[0], "ms", baseline, 1e3 * seconds[1], "ratio <= 1"),
        Measurement(f"{name}: peak memory", memory[0], "MiB", baseline, memory[1], "ratio <= 1"),
    ]


def _documents(dataset: FusionDataset, options: argparse.Namespace) -> list[Measurement]:
    plan = _plan(dataset, dataset.train, options, packed=True)
    lengths = [
        int(dataset.lengths(mode)[example]) - 1 for mode, example in plan.sequences[len(plan.sequences) // 2]
    ]
    tensors = _random_tensors(sum(lengths))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document).tril()

    def one_by_one() -> None:
        torch.autograd.grad(causal_attention(*tensors, lengths=lengths).sum(), tensors)

    def under_a_mask() -> None:
        rows = (of.permute(1, 2, 0, 3) for of in tensors)
        torch.autograd.grad(scaled_dot_product_attention(*rows, attn_mask=mask).sum(), tensors)

    seconds = medians_in_turns(options.repeats, one_by_one, under_a_mask)
    name = f"attention over {len(lengths)} documents of {sum(lengths)} tokens: time"
    return [Measurement(name, 1e3 * seconds[0], "ms", "block-diagonal mask", 1e3 * seconds[1], "ratio <= 1")]


def _packing(dataset: FusionDataset, options: argparse.Namespace) -> list[Measurement]:
    """Step by step, packed and padded in turns."""
    sizes = {
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": options.seq_length,
        "tie_word_embeddings": True,
        **_SIZES,
    }
    architecture = read_architecture(LlamaConfig(**sizes))
    torch.manual_seed(0)
    config = transformer_config(architecture, transformer_impl="local", perform_initialization=True)
    model = build_model(architecture, config, seq_length=options.seq_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    # The first of a process is slow.
    _step(dataset, model, optimizer, dataset.train[:2], options, packed=True)
    seconds, filled, positions = np.zeros(2), 0, np.zeros(2)
    for examples in np.split(
        dataset.train, range(options.global_batch_size, len(dataset.train), options.global_batch_size)
    ):
        for kind, packed in enumerate((True, False)):
            start = time.perf_counter()
            plan = _step(dataset, model, optimizer, examples, options, packed=packed)
            seconds[kind] += time.perf_counter() - start
            positions[kind] += len(plan.sequences) * plan.seq_length
        filled += plan.tokens
    padding = 100 * (1 - filled / positions)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = (
        f"packed training, {parameters / 1e6:.0f} M parameters, {options.global_batch_size} examples a step"
    )
    speed = filled / seconds
    return [
        Measurement(f"{name}: speed", speed[0], "useful tokens/s", "padded", speed[1], "ratio >= 2"),
        Measurement(f"{name}: padding", padding[0], "%", "padded", padding[1]),
    ]


def _step(
    dataset: FusionDataset,
    model: FusionGPTModel,
    optimizer: torch.optim.Optimizer,
    examples: np.ndarray,
    options: argparse.Namespace,
    *,
    packed: bool,
) -> GlobalBatch:
    """One optimizer step over the examples."""
    plan = _plan(dataset, examples, options, packed=packed)
    place = {
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "with_targets": True,
        "device": torch.device("cpu"),
    }
    get_forward_backward_func()(
        forward_step_func=make_forward_step(micro_batches=plan.micro_batches, sources=len(dataset.sources)),
        data_iterator=micro_batches(dataset, plan, **place),
        model=model,
        num_microbatches=plan.micro_batches,
        seq_length=plan.seq_length,
        micro_batch_size=1,
        forward_only=False,
    )
    optimizer.step()
    optimizer.zero_grad()
    return plan


def _plan(
    dataset: FusionDataset, examples: np.ndarray, options: argparse.Namespace, *, packed: bool
) -> GlobalBatch:
    pack_into = options.seq_length if packed else None
    return plan_batch(
        dataset, examples, _WEIGHTS, micro_batch_size=1, data_parallel_size=1, pack_into=pack_into
    )


def _random_tensors(length: int) -> list[Tensor]:
    """Query, key and value [s, 1, h, d]."""
    generator = torch.Generator().manual_seed(3)
    shape = (length, 1, _HEADS, _HEAD_DIM)
    return [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]


def _peak_memory(work: Callable[[], object]) -> float:
    """MiB of this process's resident set at most while it works, above those before (Linux)."""

    def resident(field: str) -> int:
        line = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)
        )
        return int(line.split()[1]) * 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    work()
    return (resident("VmHWM") - before) / _MEBIBYTE


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
