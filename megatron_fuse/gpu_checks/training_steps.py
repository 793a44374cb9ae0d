"""Measures training steps of a Llama with 1.2 billion parameters.

Variants: fine-tuning, fusion, fusion with the loss fused with the output layer, fusion with packing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fuse.gpu_checks.clock import free_memory, peak_bytes, seconds_in_turns
from megatron_fuse.gpu_checks.rows import Row, failed, holds, measured, measured_or_held, not_run
from megatron_fuse.gpu_checks.synthetic import (
    LLAMA_1B,
    LLAMA_TINY,
    RandomDocuments,
    random_trainer,
    recipe_of_random_target,
)
from megatron_fuse.runtime import Runtime, start_runtime

_ENTRIES = 10
_FUSION = {"training": (1.0, 0.5)}
_TUNING = {"training": (1.0, 0.0)}


@dataclass(frozen=True)
class Sizes:
    model: dict[str, Any]
    positions: int  # positions of a document
    documents: int  # documents of a step, in one micro-batch
    repeats: int


_FULL = Sizes(LLAMA_1B, positions=2048, documents=4, repeats=10)
_TINY = Sizes(LLAMA_TINY, positions=32, documents=2, repeats=2)


@dataclass(frozen=True)
class Variant:
    """A way to train. sections: the options of the recipe that differ."""

    name: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    packing: bool = False
    beside_tuning: bool = False  # measured in turns with steps of fine-tuning


_VARIANTS = (
    Variant("fusion", beside_tuning=True),
    Variant("fusion, fused linear", {"loss": {"fused_linear": True}}),
    Variant("fusion, packed", packing=True),
)


def run(device: str, directory: Path) -> Iterator[Row]:
    runtime = start_runtime()
    from megatron_fuse.runtime.libraries import has_transformer_engine
    from megatron_fuse.training.memory import is_out_of_memory

    sizes = _FULL if device == "cuda" else _TINY
    has_engine = device == "cuda" and has_transformer_engine()
    for implementation in ("local", "transformer_engine"):
        if implementation == "transformer_engine" and not has_engine:
            yield not_run("transformer_engine", "not in use here")
            continue
        for variant in _VARIANTS:
            name = f"{implementation}: {variant.name}"
            try:
                yield from _rows(
                    name, device, directory / name.replace(" ", "-"), runtime, implementation, variant, sizes
                )
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                yield not_run(name, "out of memory")
            free_memory(device)


def _rows(
    name: str,
    device: str,
    directory: Path,
    runtime: Runtime,
    implementation: str,
    variant: Variant,
    sizes: Sizes,
) -> Iterator[Row]:
    from megatron_fuse.training.memory import estimate_memory
    from megatron_fuse.training.throughput import peak_flops_of_this_gpu, training_flops
    from megatron_fuse.training.trainer import forward_backward, plan_step, train_step

    counts = device == "cuda"
    fusion = _trainer(directory, runtime, implementation, variant, sizes)
    batch = plan_step(fusion, fusion.dataset.train, _FUSION)
    positions = fusion.dataset.lengths("training") - 1
    works: list[Callable[[], object]] = [lambda: train_step(fusion, batch, 1e-5)]
    if variant.beside_tuning:
        plain = RandomDocuments(positions, sizes.model["vocab_size"], entries=0)
        tuning = replace(fusion, dataset=plain)
        plain_batch = plan_step(tuning, plain.train, _TUNING)
        works.append(lambda: train_step(tuning, plain_batch, 1e-5))
    seconds, *of_tuning = seconds_in_turns(device, sizes.repeats, *works)
    yield measured(f"{name}: step", 1e3 * seconds, "ms")
    if of_tuning:
        yield measured(f"{implementation}: fine-tuning: step", 1e3 * of_tuning[0], "ms")
        ratio = seconds / of_tuning[0]
        yield measured_or_held(f"{name}: step over fine-tuning", ratio, "", "<= 1.02", counts=counts)
    yield measured(f"{name}: speed", positions.sum() / seconds, "tokens/s")
    rate = training_flops(fusion.architecture, positions) / seconds
    yield measured(f"{name}: rate", rate / 1e12, "TFLOP/s")
    peak = peak_flops_of_this_gpu()
    if peak is None:
        yield not_run(f"{name}: MFU", "no peak rate of this device is known")
    else:
        mfu = rate / peak
        yield measured_or_held(f"{name}: MFU", mfu, "", ">= 0.4", counts=variant.beside_tuning)
    values = train_step(fusion, batch, 1e-5)
    yield holds(
        f"{name}: loss and gradient are finite", all(map(math.isfinite, values.values())), str(values)
    )
    if not counts:
        yield not_run(f"{name}: memory, synchronisations", "of a GPU alone")
        return
    estimate = estimate_memory(
        fusion.recipe, fusion.architecture, sequence=batch.seq_length, data_parallel_size=1, stage=0
    ).total
    most = peak_bytes(works[0])
    yield measured(f"{name}: peak memory", most / 2**30, "GiB")
    yield measured(f"{name}: estimated memory", estimate / 2**30, "GiB")
    yield measured_or_held(
        f"{name}: peak memory over the estimate", most / estimate, "", "<= 1.25", counts=True
    )
    yield _waits_for_nothing(name, lambda: forward_backward(fusion, batch, forward_only=False))


def _trainer(directory: Path, runtime: Runtime, implementation: str, variant: Variant, sizes: Sizes) -> Any:
    whole = sizes.positions * sizes.documents
    if variant.packing:  # short and long documents, with as many positions together as in the other variants
        shares = np.array([1, 2, 3, 4, 6] * 2)
        positions = whole * shares // shares.sum()
    else:
        positions = np.full(sizes.documents, sizes.positions)
    training = {
        "global_batch_size": len(positions),
        "micro_batch_size": 1 if variant.packing else sizes.documents,
        "packing": variant.packing,
    }
    sections = {"parallel": {"transformer_impl": implementation}, **variant.sections, "training": training}
    recipe = recipe_of_random_target(directory, sizes.model, whole, **sections)
    return random_trainer(recipe, runtime, RandomDocuments(positions, sizes.model["vocab_size"], _ENTRIES))


def _waits_for_nothing(name: str, work: Callable[[], object]) -> Row:
    """Checks that forward and backward pass never wait for the GPU.

    In this mode torch raises an error at the first wait.
    """
    what = f"{name}: forward and backward without a synchronisation"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        return failed(what, str(error))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return holds(what, True)
