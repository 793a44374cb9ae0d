"""The layer spec of an architecture: Megatron-core's, with the parts in which it differs from a Llama's."""

from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.attention import CausalAttention
from megatron_fuse.model.norms import (
    AllHeadsRMSNorm,
    NormedRowParallelLinear,
    RMSNorm,
    ZeroCenteredRMSNorm,
)
from megatron_fuse.runtime.megatron_versions import submodules_of


def layer_spec(
    architecture: Architecture, config: TransformerConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The transformer layers of this rank's chunk, by the implementation that config.transformer_impl
    names.
    """
    if config.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    # The norms are set here. Megatron would give the last one to apex if a package of that name is installed,
    # but apex's kernel knows no RMSNorm.
    norm = ZeroCenteredRMSNorm if architecture.zero_centered_norms else RMSNorm
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    _set_attention(spec.submodules.self_attention, architecture, norm)
    before = norm if architecture.norms_before else IdentityOp
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = before
    if architecture.norms_after:
        last = ModuleSpec(NormedRowParallelLinear, params={"norm": norm})
        spec.submodules.self_attention.submodules.linear_proj = last
        submodules_of(spec.submodules.mlp).linear_fc2 = last
    if architecture.experts is not None:  # as Transformer Engine's layers name it, which have this norm too
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layers = [spec] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _set_attention(attention: ModuleSpec, architecture: Architecture, norm: type) -> None:
    a, parts = architecture, attention.submodules
    parts.core_attention = CausalAttention
    if a.attention_softcap is not None:
        parts.core_attention = partial(CausalAttention, softcap=a.attention_softcap)
    if a.query_key_norm == "per head":
        parts.q_layernorm = parts.k_layernorm = norm
    elif a.query_key_norm == "all heads":
        parts.q_layernorm = ModuleSpec(AllHeadsRMSNorm, params={"heads": a.num_attention_heads})
        parts.k_layernorm = ModuleSpec(AllHeadsRMSNorm, params={"heads": a.num_query_groups})
    if a.local_inverse_frequencies is not None:
        attention.module = AttentionWithOwnRotations


class AttentionWithOwnRotations(SelfAttention):
    """Self-attention that takes the rotations of its kind of layer out of those of both kinds."""

    def forward(self, *inputs: object, rotary_pos_emb: Tensor, **named: object) -> tuple[Tensor, None]:
        """rotary_pos_emb [s, 1, 2, channels]: of layers without and of layers with a window."""
        config = self.config
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        )
        own = rotary_pos_emb[:, :, 1:] if windowed else rotary_pos_emb[:, :, :1]
        return super().forward(*inputs, rotary_pos_emb=own, **named)
