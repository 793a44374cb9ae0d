"""Fusion data from a source in Megatron differ from those of its model in process by rounding alone."""

import shutil
from typing import Any

import numpy as np

from megatron_fuse.capture import capture
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.stages import Context

SOURCE = "alpha"
# Log-probabilities are stored in half precision: two that are equal up to rounding may be stored as
# neighbours, which lie 2**-10 of the value apart.
HALF = 2**-10


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
    rows = 0
    for mode in recipe.modes_with_teacher:
        np.testing.assert_array_equal(found.winners(mode), expected.winners(mode))
        for example in range(len(found.example_ids)):
            ours, theirs = (each.document(mode, example, SOURCE) for each in (found, expected))
            for name in ("tokens", "supervised", "counts", "teacher_ids", "match"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
            np.testing.assert_allclose(
                ours.teacher_logprobs.astype(np.float32),
                theirs.teacher_logprobs.astype(np.float32),
                rtol=HALF,
                atol=1e-4,
            )
            rows += int((ours.counts > 0).sum())
    assert rows > 100
