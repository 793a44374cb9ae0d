"""How a model is divided over ranks: what the target's options and those of a source share."""

from typing import Any

from pydantic import Field

from megatron_fuse.recipe.values import Options, Ranks


class ModelParallelOptions(Options):
    tensor_model_parallel_size: Ranks = 1
    pipeline_model_parallel_size: Ranks = 1
    expert_model_parallel_size: Ranks = Field(
        1, description="ranks that share the experts of a layer, in a mixture of experts"
    )

    @property
    def model_parallel_size(self) -> int:
        """The ranks that hold the model together once, without its experts."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def sizes(self) -> dict[str, Any]:
        """Numbers of ranks by Megatron's names, as check_layout and transformer_config take them."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
        }
