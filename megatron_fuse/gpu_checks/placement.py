"""Checks that all tensors of a training step are on the GPU."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_fuse.gpu_checks.rows import Row, holds, not_run
from megatron_fuse.gpu_checks.synthetic import (
    LLAMA_TINY,
    RandomDocuments,
    random_trainer,
    recipe_of_random_target,
)
from megatron_fuse.runtime import Runtime, start_runtime

_SEQUENCE = 64
_WEIGHTS = {"training": (1.0, 0.5)}
_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "bf16": {},
    "fp32": {"training": {"precision": "fp32"}},
    "fused linear": {"loss": {"fused_linear": True}},
    "packed": {"training": {"packing": True}},
    "distributed optimizer": {"parallel": {"use_distributed_optimizer": True}},
}


def run(device: str, directory: Path) -> Iterator[Row]:
    runtime = start_runtime()
    from megatron_fuse.runtime.libraries import has_transformer_engine

    if device == "cuda" and has_transformer_engine():
        implementations = ["local", "transformer_engine"]
    else:
        implementations = ["local"]
        yield not_run("transformer_engine", "not in use here")
    for implementation in implementations:
        for kind, sections in _KINDS.items():
            if implementation == "transformer_engine" and kind == "fp32":
                continue
            parallel = {**sections.get("parallel", {}), "transformer_impl": implementation}
            recipe = recipe_of_random_target(
                directory / f"{implementation}-{kind}",
                LLAMA_TINY,
                _SEQUENCE,
                **{**sections, "parallel": parallel},
            )
            tensors = tensors_of_a_step(recipe, runtime)
            count = sum(map(len, tensors.values()))
            what = f"{implementation}, {kind}: {count} {', '.join(tensors)} on {runtime.device}"
            yield holds(what, not (wrong := _elsewhere(tensors, runtime.device)), wrong)


def _elsewhere(tensors: dict[str, list[torch.Tensor]], device: torch.device) -> str:
    """The kinds that have tensors on another device, or that have no tensors; empty if all is right."""
    wrong = []
    for kind, of_kind in tensors.items():
        devices = Counter(str(tensor.device) for tensor in of_kind)
        if devices.keys() != {str(device)}:
            places = ", ".join(f"{count} on {place}" for place, count in devices.items())
            wrong.append(f"{kind}: {places or 'none'}")
    return "; ".join(wrong)


def tensors_of_a_step(recipe: Any, runtime: Runtime) -> dict[str, list[torch.Tensor]]:
    """Kind -> the tensors of this kind, after one training step."""
    from megatron_fuse.training.batches import micro_batches
    from megatron_fuse.training.trainer import plan_step, train_step

    trainer = random_trainer(recipe, runtime, RandomDocuments([40, 30], LLAMA_TINY["vocab_size"], entries=4))
    batch = plan_step(trainer, trainer.dataset.train, _WEIGHTS)
    train_step(trainer, batch, 1e-5)
    of_batches = list(
        micro_batches(
            trainer.dataset,
            batch,
            data_parallel_rank=0,
            data_parallel_size=1,
            with_targets=True,
            device=runtime.device,
        )
    )
    model = trainer.chunks[0]
    parameters = list(model.parameters())
    return {
        "parameters": parameters,
        "buffers": [*model.buffers(), *_rotations(model)],
        "main gradients": [parameter.main_grad for parameter in parameters],
        "masters and optimizer states": list(_states(trainer.optimizer)),
        "batches": [tensor for each in of_batches for tensor in _tensors(vars(each).values())],
        "targets": [tensor for each in of_batches for tensor in vars(each.targets).values()],
    }


def _rotations(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The rotary frequencies.

    Megatron keeps them as a plain attribute, so that buffers() does not list them.
    """
    for module in model.modules():
        yield from _tensors([getattr(module, "inv_freq", None)])


def _states(optimizer: Any) -> Iterator[torch.Tensor]:
    """Parameters and states of one optimizer of Megatron, or of several in a chain.

    The step count is left out: FusedAdam may keep it on the CPU or on the GPU.
    """
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in each.optimizer.param_groups:
            yield from group["params"]
        for state in each.optimizer.state.values():
            yield from _tensors(value for name, value in state.items() if name != "step")


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    return (value for value in values if isinstance(value, torch.Tensor))
