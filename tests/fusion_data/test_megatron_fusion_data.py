"""Fusion data from a source in Megatron differ from those of its model in process by rounding alone."""

import shutil
from typing import Any

from fusion_comparison import compare_fusion_data

from megatron_fuse.capture import capture
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.stages import Context

SOURCE = "alpha"


def capture_source(content: dict[str, Any]) -> None:
    recipe = make_recipe(content)
    for mode in recipe.modes_with_teacher:
        capture(Context(recipe), SOURCE, mode)


def test_a_source_in_megatron_gives_the_same_fusion_data(  # type: ignore[no-untyped-def]
    ranks, world: Recipe, copied: Recipe
) -> None:
    for made in ("captures/alpha", "fusion"):
        shutil.rmtree(copied.workdir / made)
    content = copied.model_dump(mode="json", by_alias=True)
    content["sources"][SOURCE] |= {"backend": "megatron", "parallel": {"tensor_model_parallel_size": 2}}
    ranks(2, capture_source, content)
    recipe = make_recipe(content)
    build_fusion_data(Context(recipe))
    found, expected = FusionDataset(recipe), FusionDataset(world)
    for mode in recipe.modes_with_teacher:
        compared = compare_fusion_data(found, expected, mode, SOURCE)
        assert compared.rows > 50 and compared.at_the_cut == 0
