"""How a model is divided over ranks: what the target's options and those of a source share."""

from megatron_fuse.recipe.values import Options, Ranks


class ModelParallelOptions(Options):
    tensor_model_parallel_size: Ranks = 1
    pipeline_model_parallel_size: Ranks = 1

    @property
    def model_parallel_size(self) -> int:
        """The ranks that hold the model together once."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size
