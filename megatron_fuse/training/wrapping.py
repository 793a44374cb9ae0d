"""Data parallelism, mixed precision and the optimizer of a run, all of Megatron-core."""

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.recipe import Recipe


def wrap_chunks(
    recipe: Recipe, chunks: list[FusionGPTModel]
) -> tuple[list[Any], list[DistributedDataParallel]]:
    """The model chunks of this rank in the run's precision, and the same chunks with data parallelism around
    them.
    """
    layout, config = recipe.parallel, chunks[0].config
    bf16 = recipe.training.precision == "bf16"
    modules = [Float16Module(config, chunk) for chunk in chunks] if bf16 else chunks
    wrapped = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=layout.overlap_grad_reduce,
                use_distributed_optimizer=layout.use_distributed_optimizer,
                overlap_param_gather=layout.overlap_param_gather,
            ),
            module,
        )
        for module in modules
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if layout.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return modules, wrapped


def make_optimizer(recipe: Recipe, wrapped: list[DistributedDataParallel]) -> Any:
    """Adam with decoupled weight decay over all chunks of this rank."""
    options, layout = recipe.training, recipe.parallel
    bf16 = options.precision == "bf16"
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            clip_grad=options.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=layout.use_distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather,
        ),
        wrapped,
    )
