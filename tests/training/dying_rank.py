"""megatron_fuse.pretrain over the small target, with one rank that dies in its third step; to be started by
torchrun.

torchrun --nproc-per-node 2 dying_rank.py WORKDIR TARGET RANK
"""

import os
import sys
from pathlib import Path

from synthetic import SyntheticDataset, make_tiny_recipe

from megatron_fuse import pretrain
from megatron_fuse.errors import exit_code
from megatron_fuse.recipe import dump_recipe


def main() -> None:
    workdir, target, dying = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    recipe = workdir / f"recipe-{os.environ['RANK']}.yaml"
    recipe.write_text(dump_recipe(make_tiny_recipe(workdir, target)))
    from megatron_fuse.runtime import start_runtime

    start_runtime()
    import megatron_fuse.fusion_data
    from megatron_fuse.training import trainer

    megatron_fuse.fusion_data.FusionDataset = lambda recipe: SyntheticDataset()
    steps, plan = 0, trainer.plan_step

    def plan_or_die(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 4 and os.environ["RANK"] == dying:  # the first is the evaluation's
            (workdir / "died_at").touch()
            raise ZeroDivisionError("this rank has a bug")
        return plan(*arguments)

    trainer.plan_step = plan_or_die
    sys.argv = ["pretrain", "--recipe", str(recipe)]
    pretrain.main()


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
