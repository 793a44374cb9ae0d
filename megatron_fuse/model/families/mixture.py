"""What mixtures of experts share: the description of the experts, their config keys and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedConfig

from megatron_fuse.model.families.family import TargetConfig, Width
from megatron_fuse.model.families.weights import Table, Weight, columns, separate, whole

if TYPE_CHECKING:
    from megatron_fuse.model.architecture import Architecture

ExpertCount = Annotated[int, Field(ge=2, le=2**14)]


@dataclass(frozen=True)
class Experts:
    """The experts in the place of each MLP. A router gives every token to some of them."""

    count: int  # of a layer
    per_token: int
    normalized: bool  # the weights of a token's experts add up to 1


class MixtureConfig(TargetConfig):
    num_experts_per_tok: Annotated[int, Field(ge=1, le=2**14)]
    # transformers knows this key by both names.
    num_experts: ExpertCount | None = None
    num_local_experts: ExpertCount | None = None
    moe_intermediate_size: Width | None = None
    norm_topk_prob: bool | None = None

    @model_validator(mode="after")
    def _has_experts_to_choose(self) -> Self:
        count = self.num_local_experts or self.num_experts
        if count is None:
            raise ValueError("has neither num_experts nor num_local_experts. Add the number of experts.")
        if self.num_experts_per_tok > count:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but a layer has {count} experts"
            )
        return self


def experts(config: PreTrainedConfig, *, normalized: bool) -> Experts:
    return Experts(config.num_local_experts, config.num_experts_per_tok, normalized)


def mixture(a: Architecture, block: str, gate: str, up: str, down: str) -> Table:
    """The weights of the router and of all experts of a layer.

    block: the prefix of their tensors in a layer. gate, up, down: the names of an expert's matrices.
    """
    assert a.experts is not None
    ffn, hidden = a.ffn_hidden_size, a.hidden_size
    table: dict[str, Weight] = {"mlp.router.weight": whole(f"{block}.gate.weight", a.experts.count, hidden)}
    for number in range(a.experts.count):
        place, prefix = f"{block}.experts.{number}", f"mlp.experts.local_experts.{number}"
        gate_and_up = separate((f"{place}.{gate}.weight", ffn), (f"{place}.{up}.weight", ffn))
        table[f"{prefix}.linear_fc1.weight"] = Weight(gate_and_up, (hidden,))
        table[f"{prefix}.linear_fc2.weight"] = columns(f"{place}.{down}.weight", ffn, hidden)
    return table


def mixture_traits(config: PreTrainedConfig) -> dict[str, Any]:
    """Of a class whose config says whether the weights of a token's experts add up to 1."""
    return {"experts": experts(config, normalized=config.norm_topk_prob)}
