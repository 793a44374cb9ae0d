"""Megatron's TransformerConfig of a target at a parallel layout, within what this machine can run."""

import math
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, check_layout, shares_sequence
from megatron_fuse.model.families.mixture import Experts
from megatron_fuse.model.pipeline_split import EVEN, PipelineSplit, layers_of_stages
from megatron_fuse.runtime.libraries import has_gradient_accumulation_fusion, has_transformer_engine

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


def transformer_config(
    architecture: Architecture,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    split: PipelineSplit = EVEN,
    params_dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    transformer_impl: str = "auto",
    perform_initialization: bool = False,
    moe_aux_loss_coeff: float = 0.0,
    **megatron_options: object,
) -> TransformerConfig:
    """Megatron's config of this architecture at this layout.

    split: what is stated of the layers of the pipeline stages.
    transformer_impl: `transformer_engine`, `local`, or `auto`: Transformer Engine if it and CUDA are
        available and its layers have all parts of the architecture, else local.
    perform_initialization: False leaves parameters unset, because a target's weights always come from a
        checkpoint.
    sequence_parallel: see shares_sequence.
    moe_aux_loss_coeff: weight of the loss that spreads tokens over experts; 0: no such loss.
    megatron_options: further TransformerConfig fields by Megatron's own names, for example
        recompute_granularity.

    Raises UserError as check_layout does, for an implementation that this machine cannot run, and for context
    parallelism.
    """
    check_layout(
        architecture,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        split=split,
    )
    implementation = resolve_transformer_impl(transformer_impl)
    if implementation == "transformer_engine" and (missing := _local_parts(architecture)):
        if transformer_impl != "auto":
            raise UserError(
                f"--transformer-impl transformer_engine: a target of class {architecture.family} has "
                f"{' and '.join(missing)}, which exists only in the local layers. Set it to local or auto."
            )
        implementation = "local"
    if megatron_options.get("context_parallel_size", 1) != 1:
        raise UserError(
            "--context-parallel-size: sequences cannot be split over ranks, because the targets and the rows "
            "of their teacher are not split. Remove the option. To save memory, use tensor parallelism, "
            "recompute or a shorter --seq-length."
        )
    on_gpu = torch.cuda.is_available()
    options: dict[str, object] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.rms_norm_eps,
        "layernorm_zero_centered_gamma": architecture.zero_centered_norms,
        # With it Megatron sums the tensor ranks' parts of these norms' gradients. A norm over all heads is
        # split over the ranks instead.
        "qk_layernorm": architecture.query_key_norm == "per head",
        "softmax_scale": architecture.attention_scale,
        "gated_linear_unit": True,
        "activation_func": ACTIVATIONS[architecture.activation],
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": architecture.initializer_range,
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        # Megatron takes any number, even 1, to mean an interleaved schedule.
        # One chunk per rank is not interleaved: None.
        "virtual_pipeline_model_parallel_size": virtual_chunks(virtual_pipeline_model_parallel_size),
        "sequence_parallel": shares_sequence(architecture, tensor_model_parallel_size, sequence_parallel),
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype is torch.bfloat16,
        "fp16": params_dtype is torch.float16,
        "transformer_impl": implementation,
        "perform_initialization": perform_initialization,
        "use_cpu_initialization": not on_gpu,
        "calculate_per_token_loss": False,
        # These kernels exist only on a GPU, or only with Transformer Engine or apex.
        "bias_activation_fusion": on_gpu and architecture.activation == "silu",
        "bias_dropout_fusion": on_gpu,
        "deallocate_pipeline_outputs": on_gpu,
        "batch_p2p_comm": on_gpu,
        "apply_rope_fusion": implementation == "transformer_engine" and architecture.rotation_scale == 1,
        "gradient_accumulation_fusion": on_gpu and has_gradient_accumulation_fusion(),
        "masked_softmax_fusion": False,
    }
    if architecture.experts is not None:
        options |= {
            **_of_experts(architecture, architecture.experts, moe_aux_loss_coeff),
            "moe_grouped_gemm": implementation == "transformer_engine",
            "expert_model_parallel_size": expert_model_parallel_size,
            "expert_tensor_parallel_size": expert_tensor_parallel_size,
        }
    # Megatron counts the positions to the left of a position,
    # the architecture also counts the position itself.
    if architecture.sliding_window is not None:
        options["window_size"] = (architecture.sliding_window - 1, 0)
        options["window_attn_skip_freq"] = [int(sliding) for sliding in architecture.sliding_layers]
    if architecture.rotated_layers is not None:
        options["no_rope_freq"] = [int(not rotated) for rotated in architecture.rotated_layers]
    stages = layers_of_stages(architecture.num_layers, pipeline_model_parallel_size, split)
    if len(set(stages)) > 1:
        options["num_layers_in_first_pipeline_stage"] = stages[0]
        options["num_layers_in_last_pipeline_stage"] = stages[-1]
    config = TransformerConfig(**(options | megatron_options))
    if architecture.rotation_scale != 1:
        # Attention multiplies cosine and sine by 0.1 mscale log(factor) + 1: here by rotation_scale.
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale = 10 * (architecture.rotation_scale - 1)
        config.yarn_mscale_all_dim = 0.0
    return config


def _of_experts(architecture: Architecture, experts: Experts, aux_loss_coeff: float) -> dict[str, object]:
    """Megatron's options of a mixture of experts, apart from its layout."""
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # False: a softmax over the experts of the token, so that their weights add up to 1.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if aux_loss_coeff else "none",
        "moe_aux_loss_coeff": aux_loss_coeff,
        "moe_token_dispatcher_type": "alltoall",
    }


def _local_parts(architecture: Architecture) -> list[str]:
    """The parts of an architecture that only the local layers have, in words."""
    parts = {
        "norms after attention and MLP": architecture.norms_after,
        "query and key norms over all heads": architecture.query_key_norm == "all heads",
        "soft-capped attention scores": architecture.attention_softcap is not None,
        "two kinds of rotations": architecture.local_inverse_frequencies is not None,
    }
    return [words for words, present in parts.items() if present]


def virtual_chunks(virtual_pipeline_model_parallel_size: int | None) -> int | None:
    """Chunks per pipeline rank in Megatron's form: None if there is only one."""
    size = virtual_pipeline_model_parallel_size
    return None if size in (None, 1) else size


def resolve_transformer_impl(transformer_impl: str) -> str:
    """`auto` decided for this machine.

    Raises UserError for an unknown word or a missing Transformer Engine.
    """
    available = torch.cuda.is_available() and has_transformer_engine()
    if transformer_impl == "auto":
        return "transformer_engine" if available else "local"
    if transformer_impl == "transformer_engine" and not available:
        raise UserError(
            "--transformer-impl transformer_engine needs CUDA and a Transformer Engine that Megatron-core "
            "can import. Set it to local or auto, or see docs/install.md."
        )
    if transformer_impl not in ("local", "transformer_engine"):
        raise UserError(
            f"--transformer-impl is {transformer_impl!r}. Choose auto, local or transformer_engine."
        )
    return transformer_impl
