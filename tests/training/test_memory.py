"""The dry run's estimates are what a rank then holds."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import make_tiny_target
from test_guards import make_tiny_trainer
from test_layouts import experts, layout

from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.training.directories import metrics_directory


def built_and_estimated(workdir: Path, target: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """Of this rank after one step: what is there, beside the estimate; and what the reporting rank prints."""
    import contextlib
    import io

    from megatron.core import parallel_state

    from megatron_fuse.training.dry_run import print_dry_run
    from megatron_fuse.training.memory import estimate_memory, rank_parameters, sequence_of_run
    from megatron_fuse.training.trainer import train

    trainer = make_tiny_trainer(workdir, target, sections)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_dry_run(trainer)
        assert not metrics_directory(trainer.recipe).exists()
        torch.distributed.barrier()  # no rank makes the directory before all have looked
        train(trainer)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    weights = [weight for chunk in trainer.chunks for weight in chunk.parameters()]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    parts = trainer.optimizer.chained_optimizers
    of_optimizer = [
        weight for part in parts for group in part.optimizer.param_groups for weight in group["params"]
    ]
    gradients = {
        weight.main_grad.untyped_storage().data_ptr(): weight.main_grad.untyped_storage()
        for weight in weights
    }
    return {
        "parameters": (
            sum(weight.numel() for weight in weights),
            rank_parameters(trainer.architecture, trainer.recipe, stage),
        ),
        "found": {
            "weights": size(weights),
            "gradients": sum(storage.nbytes() for storage in gradients.values()),
            "masters": size(of_optimizer) if trainer.recipe.training.precision == "bf16" else 0,
            "moments": size(m for part in parts for s in part.optimizer.state.values() for m in s.values()),
        },
        "estimated": dataclasses.asdict(
            estimate_memory(
                trainer.recipe,
                trainer.architecture,
                sequence=sequence_of_run(trainer.recipe, trainer.dataset),
                data_parallel_size=trainer.runtime.data_parallel_size,
                stage=stage,
            )
        ),
        "printed": printed.getvalue(),
    }


@pytest.mark.parametrize(
    ("world_size", "parallel", "training"),
    [
        pytest.param(2, layout(tp=2), {"precision": "bf16"}, id="tp2-bf16"),
        pytest.param(
            4,
            layout(pp=2, use_distributed_optimizer=True),
            {"precision": "bf16"},
            id="pp2-dp2-distributed-bf16",
        ),
        pytest.param(
            2, layout(use_distributed_optimizer=True), {}, id="dp2-distributed-fp32", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", False),
        ("llama", True),
        ("gemma3", True),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("qwen3", "phi3", "olmo2")),
    ],
)
def test_the_memory_estimate_is_what_a_rank_then_holds(  # type: ignore[no-untyped-def]
    ranks, tmp_path, world_size, parallel, training, family, tied
) -> None:
    target = make_tiny_target(tmp_path / "target", layers=4, tied=tied, family=family)
    sections = {"parallel": parallel, "training": {"train_iters": 1, **training}}
    results = ranks(world_size, built_and_estimated, tmp_path / "run", target, sections)
    for result in results:
        assert result["parameters"][0] == result["parameters"][1]
        for name, found in result["found"].items():
            # A rank's share of the distributed optimizer is cut and padded to 128 elements, not to whole
            # weights.
            assert found == pytest.approx(result["estimated"][name], rel=0.05), name
    (printed,) = [result["printed"] for result in results if "dry run" in result["printed"]]
    assert all(f"{result['parameters'][0]:,}" in printed for result in results)
    assert re.search(r"inference +1 - 7 +7 +53 ", printed) and re.search(
        r"co-fusion +8 - 21 +14 +106 ", printed
    )


@pytest.mark.parametrize(
    "parallel",
    [
        experts(4, use_distributed_optimizer=True),
        experts(2, tensor_model_parallel_size=2, use_distributed_optimizer=True),
        pytest.param(experts(2, pipeline_model_parallel_size=2), marks=pytest.mark.slow),
    ],
    ids=["ep4-distributed", "tp2-ep2-distributed", "pp2-ep2"],
)
def test_the_memory_estimate_counts_experts(ranks, tmp_path, parallel) -> None:  # type: ignore[no-untyped-def]
    target = make_tiny_target(tmp_path / "target", layers=4, family="mixtral")
    sections = {"parallel": parallel, "training": {"train_iters": 1}}
    for result in ranks(4, built_and_estimated, tmp_path / "run", target, sections):
        assert result["parameters"][0] == result["parameters"][1]
        for name, found in result["found"].items():
            assert found == pytest.approx(result["estimated"][name], rel=0.05), name


def largest_and_estimated(workdir: Path, target: Path, training: dict[str, Any]) -> tuple[int, float, str]:
    """Positions of the largest micro-batch of any step, those whose logits are estimated, and what a dry
    run says of them.
    """
    import contextlib
    import io

    from megatron_fuse.training.batches import phase_weights
    from megatron_fuse.training.dry_run import print_dry_run
    from megatron_fuse.training.memory import estimate_memory, sequence_of_run
    from megatron_fuse.training.trainer import plan_step

    trainer = make_tiny_trainer(workdir, target, {"training": training})
    samples, longest = 0, 0
    while step := trainer.schedule.step(samples):
        examples = trainer.dataset.train[step.examples]
        longest = max(
            longest,
            plan_step(
                trainer, examples, phase_weights(step.phase, progress=step.progress, kl_factor=1.0)
            ).seq_length,
        )
        samples = step.consumed_samples
    place = {
        "sequence": sequence_of_run(trainer.recipe, trainer.dataset),
        "data_parallel_size": 1,
        "stage": 0,
    }
    estimated = estimate_memory(trainer.recipe, trainer.architecture, **place).logits
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_dry_run(trainer)
    size = trainer.recipe.training.micro_batch_size
    return size * longest, estimated / (4 * trainer.architecture.padded_vocab_size), printed.getvalue()


# The longest document takes 27 positions, 32 with its padding: --seq-length does not matter until documents
# are packed up to it.
@pytest.mark.parametrize(
    ("training", "says"),
    [
        pytest.param(
            {"seq_length": 40, "micro_batch_size": 1}, "1 x 32 positions, padded", marks=pytest.mark.slow
        ),
        ({"seq_length": 64, "micro_batch_size": 3}, "3 x 32 positions, padded"),
        ({"seq_length": 40, "micro_batch_size": 1, "packing": True}, "1 x 40 positions, packed"),
        pytest.param(
            {"seq_length": 61, "micro_batch_size": 1, "packing": True},
            "1 x 64 positions, packed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_estimate_is_of_the_largest_micro_batch(ranks, tmp_path, training, says) -> None:  # type: ignore[no-untyped-def]
    target = make_tiny_target(tmp_path / "target")
    ((largest, estimated, printed),) = ranks(1, largest_and_estimated, tmp_path / "run", target, training)
    assert says in printed
    if training.get("packing"):  # a step's documents may spread evenly over less
        assert 0.8 * estimated <= largest <= estimated
    else:
        assert largest == estimated


def kept_by_a_layer(shape: dict[str, int]) -> tuple[float, float]:
    """Elements of one token that autograd really keeps of one layer, and their estimate."""
    from transformers import LlamaConfig

    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.model.gpt import build_model
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training.memory import activation_elements

    start_runtime()
    tokens, totals = 128, []
    for layers in (1, 2):
        config = LlamaConfig(
            vocab_size=128, num_hidden_layers=layers, max_position_embeddings=tokens, **shape
        )
        config.architectures = ["LlamaForCausalLM"]
        architecture = read_architecture(config)
        model = build_model(architecture, transformer_config(architecture, perform_initialization=True))
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, kept: dict = kept, weights: set = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(1, tokens, dtype=torch.int64), torch.arange(tokens)[None], None)
        totals.append(sum(storage.nbytes() for storage in kept.values()))
    return (totals[1] - totals[0]) / 4 / tokens, activation_elements(architecture, 1)


# As many key/value heads as query heads and fewer; heads that are wider together than the hidden size; a wide
# and a narrow MLP.
@pytest.mark.parametrize(
    ("hidden", "mlp", "heads", "groups", "head_dim"),
    [(64, 172, 4, 4, 16), (64, 256, 4, 2, 32), (128, 128, 8, 1, 16)],
)
def test_the_activations_of_a_layer_are_those_that_autograd_keeps(  # type: ignore[no-untyped-def]
    ranks, hidden, mlp, heads, groups, head_dim
) -> None:
    shape = {"hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads}
    ((found, estimated),) = ranks(
        1, kept_by_a_layer, {**shape, "num_key_value_heads": groups, "head_dim": head_dim}
    )
    # Norms keep a number a row, attention one a head and row.
    assert estimated == pytest.approx(found, rel=0.05)
