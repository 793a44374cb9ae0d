"""What `--plan` takes a run to cost follows the recipe: the sample, the prompts, the answers' limit, the
steps, the weights' type.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.pipeline import steps
from megatron_fuse.pipeline.estimates import estimate_amounts
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context
from megatron_fuse.training.stage import training_flops, training_tokens

# 10; 2 or 6.
ROWS = [{"instruction": "Copy it. " + "w" * 31, "output": "x" * (8 if i % 2 else 24)} for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "alpha", "llama")


def recipe_of(tmp_path: Path, model: Path, rows: list = ROWS, **sections: object) -> Recipe:
    rows = [{"id": str(number), **row} for number, row in enumerate(rows)]
    sections = {"responses": {"max_new_tokens": 4}, "schedule": {"preset": "profuser"}, **sections}
    sections["training"] = {"seq_length": 512, "global_batch_size": 4, **sections.get("training", {})}
    data = write_rows(tmp_path / "data.jsonl", rows)
    reward_model = {"reward": {"model": str(model)}}
    return small_recipe(
        tmp_path / "work",
        data,
        model,
        {"alpha": model, "beta": model},
        reward_models=reward_model,
        **sections,
    )


@pytest.mark.parametrize(("samples", "examples"), [(None, 40), (8, 8), (1000, 40)])
def test_a_sample_is_counted_before_the_instructions_are_prepared(
    tmp_path: Path, model: Path, samples: int | None, examples: int
) -> None:
    amounts = estimate_amounts(Context(recipe_of(tmp_path, model, data={"samples": samples})))
    assert amounts.examples == examples
    assert amounts.prompt_tokens == pytest.approx(10 * examples)
    assert amounts.response_tokens == pytest.approx(4 * examples)
    # Max_new_tokens cuts the longer half.
    assert amounts.answer_tokens == pytest.approx((4 + 2) / 2 * examples)


def test_a_file_of_longer_conversations_than_seq_length_costs_what_is_kept(
    tmp_path: Path, model: Path
) -> None:
    rows = [{"instruction": "a" * 400, "output": "b" * 400}] * 1
    amounts = estimate_amounts(Context(recipe_of(tmp_path, model, rows, training={"seq_length": 20})))
    assert amounts.read("training") == pytest.approx(20)


def test_prepared_instructions_are_counted_by_their_tokens(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(tmp_path, model, data={"samples": 20, "validation_samples": 4})
    counts = prepare_instructions(Context(recipe)).counts
    amounts = estimate_amounts(Context(recipe))
    assert (amounts.examples, amounts.validation_examples) == (20, 4)
    assert amounts.read("training") == pytest.approx(counts["target_tokens"])
    assert amounts.learned("training") / amounts.read("training") == pytest.approx(4 / 14, abs=0.05)


def test_instructions_of_another_recipe_are_not_counted(tmp_path: Path, model: Path) -> None:
    prepare_instructions(Context(recipe_of(tmp_path, model, data={"samples": 20})))
    assert estimate_amounts(Context(recipe_of(tmp_path, model, data={"samples": 8}))).examples == 8


@pytest.mark.parametrize(("supervise", "learned"), [("every_turn", 7), ("last_turn", 4)])
def test_turns_that_are_not_learned_are_read_as_prompts(
    tmp_path: Path, model: Path, supervise: str, learned: int
) -> None:
    turns = [("user", 5), ("assistant", 3), ("user", 2), ("assistant", 4)]
    row = {"messages": [{"role": role, "content": "abcd" * count} for role, count in turns]}
    amounts = estimate_amounts(Context(recipe_of(tmp_path, model, [row], data={"supervise": supervise})))
    assert (amounts.learned("training"), amounts.read("training")) == (learned, 14)
    assert amounts.question_tokens == 10  # a model answers the last turn only


def test_training_costs_as_many_steps_as_it_takes(tmp_path: Path, model: Path) -> None:
    whole = recipe_of(tmp_path, model, data={"validation_samples": 8})
    amounts = estimate_amounts(Context(whole))
    total = training_tokens(whole, amounts)
    # ProFuser: one epoch of the inference mode, two of both, over the 32 of 40 that are no validation
    # examples
    assert total == pytest.approx(32 / 40 * (3 * amounts.read("inference") + 2 * amounts.read("training")))
    one_step = training_tokens(recipe_of(tmp_path, model, training={"train_iters": 1}), amounts)
    two_steps = training_tokens(recipe_of(tmp_path, model, training={"train_iters": 2}), amounts)
    assert 0 < one_step == pytest.approx(two_steps / 2)
    assert training_tokens(recipe_of(tmp_path, model, training={"train_iters": 10**6}), amounts) == total
    few = training_flops(Context(recipe_of(tmp_path, model, training={"train_iters": 1})), amounts)
    assert few == pytest.approx(6 * count_parameters(model) * one_step)


def test_answers_cost_prompts_and_at_most_max_new_tokens(tmp_path: Path, model: Path) -> None:
    def flops(**responses: int) -> float:
        recipe = recipe_of(tmp_path, model, responses=responses)
        context = Context(recipe)
        return steps(recipe)["responses"][0].flops(context, estimate_amounts(context))

    parameters = count_parameters(model)
    assert flops(max_new_tokens=1) == pytest.approx(2 * parameters * 40 * (10 + 1))
    assert flops(max_new_tokens=512) == pytest.approx(2 * parameters * 40 * (10 + 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_parameters_are_counted_whatever_their_type(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    tensors = {"a.weight": torch.zeros(7, 11, dtype=dtype), "b.weight": torch.zeros(13, dtype=dtype)}
    if form == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        for name, tensor in tensors.items():
            save_file({name: tensor}, tmp_path / f"{name}.safetensors")
        index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert count_parameters(tmp_path) == 7 * 11 + 13


def test_a_file_without_a_usable_row_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match="none of its 1 rows can be used in alpaca form"):
        estimate_amounts(Context(recipe_of(tmp_path, model, [{"instruction": "a", "output": ""}])))
