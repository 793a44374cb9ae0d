"""Brings captures into the target's tokens and chooses the source with the advantage on every example.

    python tools/build_fusion_data.py --recipe examples/quickstart/recipe.yaml
    torchrun --nproc-per-node 8 tools/build_fusion_data.py --recipe ...       # rank r takes every 8th shard

Writes WORKDIR/fusion/MAP-UNMATCHED-T. Where the documents are built already, only the choice is made again (a second).
"""

from collections import Counter

from megatron_fuse.errors import exit_code
from megatron_fuse.fusion_data import build_fusion_data
from megatron_fuse.recipe import load_recipe
from megatron_fuse.storage import rank_and_world


def main() -> None:
    recipe = load_recipe(__doc__)
    selections = build_fusion_data(recipe)
    if rank_and_world()[0] != 0:
        return
    sources = [*recipe.sources, "none"]  # the code of no source, -1, is the last place
    for mode, selection in selections.items():
        wins = Counter(selection.source.tolist())
        places = [*range(len(recipe.sources)), -1]
        shares = ", ".join(f"{sources[place]}: {wins[place]}" for place in places)
        print(f"{mode} mode, examples on which a source has the advantage: {shares}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
