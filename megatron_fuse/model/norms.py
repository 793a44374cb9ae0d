"""Norms of the local layer spec that Megatron-core does not have.

Legend: s sequence, b batch, h heads of this rank, d channels of a head.
"""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, also for a sequence that the tensor-parallel ranks share."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        _mark_sequence_parallel(self.weight, config)


class ZeroCenteredRMSNorm(torch.nn.Module):
    """RMSNorm that scales by 1 + weight. Computed in fp32, and rounded once to the input's type."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        _mark_sequence_parallel(self.weight, config)

    def forward(self, values: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and type."""
        return rms_norm(values.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(values)


def _mark_sequence_parallel(weight: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Marks a weight for Megatron, which then sums the gradients of the tensor ranks' positions."""
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads together, of which a tensor rank has its share.

    Collectives: one all-reduce of [s, b] fp32 over the tensor-parallel group, forward and backward.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        """hidden_size: channels of a head. heads: those of all ranks."""
        super().__init__()
        self.eps = eps
        self.channels = heads * hidden_size
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.weight = torch.nn.Parameter(torch.ones(self.channels // self.group.size()))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, values: Tensor) -> Tensor:
        """[s, b, h, d] -> the same shape and type."""
        exact = values.float()
        squares = reduce_from_tensor_model_parallel_region(
            exact.square().sum((-2, -1), keepdim=True), self.group
        )
        # Each rank has a part of the gradient of the sum: from its own heads.
        squares = copy_to_tensor_model_parallel_region(squares, self.group)
        scaled = exact * torch.rsqrt(squares / self.channels + self.eps)
        return (scaled * self.weight.float().view(values.shape[-2:])).type_as(values)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class NormedRowParallelLinear(RowParallelLinear):
    """The last matrix of an attention or an MLP, with a norm of its output before the residual sum."""

    def __init__(
        self, *sizes: int, norm: type[torch.nn.Module], config: TransformerConfig, **options: object
    ):
        super().__init__(*sizes, config=config, **options)
        self.post_layernorm = norm(config, self.output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias
