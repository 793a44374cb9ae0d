"""The layers of pipeline stages, and that a run does not depend on them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fuse.errors import UserError
from megatron_fuse.model.pipeline_split import EVEN, PipelineSplit, layers_of_stages, stated_split
from megatron_fuse.recipe.model_parallel import ParallelOptions


@pytest.mark.parametrize(
    ("layers", "stages", "split", "expected"),
    [
        (32, 1, EVEN, (32,)),
        (32, 4, EVEN, (8, 8, 8, 8)),
        (32, 3, EVEN, (11, 11, 10)),
        (61, 4, EVEN, (15, 16, 16, 14)),
        (5, 2, EVEN, (3, 2)),
        (5, 4, EVEN, (2, 1, 1, 1)),
        (30, 4, PipelineSplit(embedding=True, loss=True), (7, 8, 8, 7)),
        (31, 4, PipelineSplit(embedding=True), (7, 8, 8, 8)),
        (31, 4, PipelineSplit(loss=True), (8, 8, 8, 7)),
        (32, 4, PipelineSplit(first=5), (5, 9, 9, 9)),
        (32, 4, PipelineSplit(last=2), (10, 10, 10, 2)),
        (32, 4, PipelineSplit(first=6, last=4), (6, 11, 11, 4)),
        (32, 2, PipelineSplit(first=20, last=12), (20, 12)),
    ],
)
def test_stages_have_these_layers(
    layers: int, stages: int, split: PipelineSplit, expected: tuple[int, ...]
) -> None:
    assert layers_of_stages(layers, stages, split) == expected


@given(st.integers(1, 200), st.integers(1, 40), st.booleans(), st.booleans())
def test_every_layer_is_on_one_stage_and_no_stage_is_much_longer(
    layers: int, stages: int, embedding: bool, loss: bool
) -> None:
    split = PipelineSplit(embedding=embedding, loss=loss)
    if stages > layers:
        with pytest.raises(UserError, match=f"{stages} is more than the {layers} layers"):
            layers_of_stages(layers, stages, split)
        return
    found = layers_of_stages(layers, stages, split)
    assert len(found) == stages and sum(found) == layers and min(found) >= 1
    assert len(set(found[1:-1])) <= 1
    if not (embedding or loss) and layers % stages == 0:
        assert set(found) == {layers // stages}


@pytest.mark.parametrize(
    ("stages", "split"),
    [
        (4, PipelineSplit(first=6)),
        (4, PipelineSplit(last=32)),
        (2, PipelineSplit(first=20, last=11)),
        (3, PipelineSplit(first=20, last=12)),
    ],
)
def test_a_split_that_leaves_no_even_rest_is_refused(stages: int, split: PipelineSplit) -> None:
    with pytest.raises(UserError, match=r"--num-layers-in-first-pipeline-stage .* Choose other numbers"):
        layers_of_stages(32, stages, split)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_layers_in_first_pipeline_stage": 3}, "at least 2, not 1"),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_last_pipeline_stage": 3,
                "account_for_loss_in_pipeline_split": True,
            },
            "have no meaning beside",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "account_for_embedding_in_pipeline_split": True,
            },
            "needs an even split",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ParallelOptions.model_validate(options)


def test_a_recipe_states_its_split() -> None:
    options = {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 3}
    assert stated_split(ParallelOptions.model_validate(options)) == PipelineSplit(first=3)
