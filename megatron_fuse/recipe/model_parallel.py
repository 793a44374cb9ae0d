"""How a model is divided over ranks: what the target's options and those of a source share."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_fuse.recipe.values import Options, Ranks

# The sequences of a step are padded to a multiple of this number of positions. That gives few different
# lengths, and fills whole vector lanes.
SEQUENCE_MULTIPLE = 8


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
        """Numbers of ranks by Megatron's names, which start_runtime and transformer_config have too."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
        }


class ParallelOptions(ModelParallelOptions):
    virtual_pipeline_model_parallel_size: Ranks | None = None
    expert_tensor_parallel_size: Ranks | None = Field(
        None,
        description="tensor-parallel ranks of each expert, in a mixture of experts; default: "
        "tensor_model_parallel_size",
    )
    num_layers_in_first_pipeline_stage: Ranks | None = Field(
        None,
        description="layers of the first pipeline stage; default: evenly, or nearly so if the number of "
        "stages does not divide the layers",
    )
    num_layers_in_last_pipeline_stage: Ranks | None = Field(
        None, description="layers of the last pipeline stage; default: as for the first"
    )
    account_for_embedding_in_pipeline_split: bool = Field(
        False, description="count the embedding as a layer of the first pipeline stage"
    )
    account_for_loss_in_pipeline_split: bool = Field(
        False, description="count the output layer and the loss as a layer of the last pipeline stage"
    )
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = Field(
        False,
        description="gather the weights that the distributed optimizer has updated during the next forward "
        "pass. Needs use_distributed_optimizer and overlap_grad_reduce",
    )
    sequence_parallel: bool = Field(
        False,
        description="divide norms and residuals over the tensor-parallel ranks, along the sequence. "
        "Always so in a mixture of experts",
    )
    context_parallel_size: Ranks = Field(
        1, description="only 1 is supported: sequences are not divided over ranks"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"

    @property
    def expert_tensor_size(self) -> int:
        """The tensor-parallel ranks of each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def experts_size(self) -> int:
        """The ranks that hold the experts of a pipeline stage together once."""
        return self.expert_tensor_size * self.expert_model_parallel_size

    def expert_replicas(self, data_parallel_size: int) -> float:
        """The number of ranks that hold the same experts."""
        return data_parallel_size * self.tensor_model_parallel_size / self.experts_size

    @property
    def sizes(self) -> dict[str, Any]:
        return super().sizes | {
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size,
            "expert_tensor_parallel_size": self.expert_tensor_parallel_size,
        }

    @model_validator(mode="after")
    def _has_stages_to_interleave(self) -> Self:
        virtual = self.virtual_pipeline_model_parallel_size or 1
        if virtual > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"virtual_pipeline_model_parallel_size {virtual} needs pipeline_model_parallel_size of at "
                "least 2, not 1"
            )
        return self

    @model_validator(mode="after")
    def _splits_layers_in_one_way(self) -> Self:
        counted = self.account_for_embedding_in_pipeline_split or self.account_for_loss_in_pipeline_split
        stated = (self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage) != (
            None,
            None,
        )
        if (counted or stated) and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"{'account_for_..._in_pipeline_split' if counted else 'num_layers_in_..._pipeline_stage'} "
                "needs pipeline_model_parallel_size of at least 2, not 1"
            )
        if counted and stated:
            raise ValueError(
                "account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split have no "
                "meaning beside num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage. "
                "Remove one of the two."
            )
        if (counted or stated) and (self.virtual_pipeline_model_parallel_size or 1) > 1:
            raise ValueError(
                "virtual_pipeline_model_parallel_size needs an even split of the layers. Remove "
                f"{'account_for_..._in_pipeline_split' if counted else 'num_layers_in_..._pipeline_stage'}."
            )
        return self

    @model_validator(mode="after")
    def _has_weights_to_gather(self) -> Self:
        missing = [
            name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(self, name)
        ]
        if self.overlap_param_gather and missing:
            raise ValueError(
                f"overlap_param_gather needs {' and '.join(missing)}. Set "
                f"{'it' if len(missing) == 1 else 'them'} to true too, or set overlap_param_gather to false."
            )
        return self

    @model_validator(mode="after")
    def _splits_sequences_evenly(self) -> Self:
        size = self.tensor_model_parallel_size
        if self.sequence_parallel and (size == 1 or SEQUENCE_MULTIPLE % size):
            raise ValueError(
                f"sequence_parallel divides sequences, whose length is a multiple of {SEQUENCE_MULTIPLE}, "
                f"over the tensor-parallel ranks, but tensor_model_parallel_size is {size}. Set "
                "tensor_model_parallel_size to 2, 4 or 8."
            )
        return self

    @model_validator(mode="after")
    def _keeps_sequences_whole(self) -> Self:
        if self.context_parallel_size != 1:
            raise ValueError(
                f"context_parallel_size is {self.context_parallel_size}, but sequences cannot be divided "
                "over ranks, because their targets and teacher rows are not divided. Set it to 1. To save "
                "memory, set a larger tensor_model_parallel_size, or training.recompute."
            )
        return self
