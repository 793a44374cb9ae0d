"""Fuse several source models into one target: the training job.

    torchrun --nproc-per-node 2 pretrain_fuse.py --recipe examples/quickstart/recipe.yaml --tensor-model-parallel-size 2
    python pretrain_fuse.py --recipe R.yaml --print-recipe        # what would run, without a model or a GPU

The fusion data must exist (tools/run_recipe.py makes everything in order). Continues from the last checkpoint by itself.
"""

from megatron_fuse.errors import exit_code
from megatron_fuse.recipe import load_recipe
from megatron_fuse.runtime import start_runtime, stop_runtime
from megatron_fuse.runtime.distributed import banner
from megatron_fuse.target import read_target


def main() -> None:
    recipe = load_recipe(__doc__)
    architecture = read_target(recipe)  # refuses what cannot be trained before any process waits for another
    runtime = start_runtime(
        tensor_parallel_size=recipe.parallel.tensor_model_parallel_size,
        pipeline_parallel_size=recipe.parallel.pipeline_model_parallel_size,
        virtual_pipeline_parallel_size=recipe.parallel.virtual_pipeline_model_parallel_size,
        seed=recipe.seed,
    )
    # Megatron-core may only be imported once the runtime has prepared the process for a machine without CUDA.
    from megatron_fuse.fusion_data import FusionDataset
    from megatron_fuse.training.target import build_target
    from megatron_fuse.training.trainer import make_trainer, train

    runtime.print(banner(runtime))
    dataset = FusionDataset(recipe)
    chunks = build_target(recipe, architecture)
    train(make_trainer(recipe, runtime, architecture, chunks, dataset))
    stop_runtime()


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
