"""What a plan says that a GPU needs is what tensors really hold on a CPU, within 15 %.

CUDA's own memory, which a CPU does not have, is left out.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peak_memory import live_bytes, peak_bytes_of
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_fuse.capture.reading import logits_at
from megatron_fuse.planning.memory import answering_need, reading_need
from megatron_fuse.planning.sizes import read_size
from megatron_fuse.sources.generation import Prompt, Sampling, generate

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def measured_and_planned(
    directory: Path, sizes: dict[str, Any], parallel: dict[str, Any], training: dict[str, Any], fused: bool
) -> tuple[int, float]:
    """Bytes of this rank at the peak of its second step, and those of the plan."""
    from megatron_fuse.gpu_checks.synthetic import RandomDocuments, random_trainer, recipe_of_random_target
    from megatron_fuse.planning.memory import training_need
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training.trainer import plan_step, train_step

    runtime = start_runtime(
        tensor_model_parallel_size=parallel.get("tensor_model_parallel_size", 1),
        pipeline_model_parallel_size=parallel.get("pipeline_model_parallel_size", 1),
    )
    of_others = live_bytes()  # Megatron's gradient buffers of an earlier test in this process stay
    positions = 256
    sections = {
        "parallel": parallel,
        "loss": {"fused_linear": fused},
        "training": {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", **training},
    }
    target = directory / str(torch.distributed.get_rank())
    recipe = recipe_of_random_target(target, sizes, positions, **sections)
    trainer = random_trainer(recipe, runtime, RandomDocuments([positions] * 4, sizes["vocab_size"], 10))
    batch = plan_step(trainer, trainer.dataset.train, {"training": (1.0, 0.5)})
    train_step(trainer, batch, 1e-5)  # makes the optimizer's states
    before = live_bytes() - of_others
    peak = before + peak_bytes_of(lambda: train_step(trainer, batch, 1e-5))
    need = training_need(recipe, trainer.architecture, data_parallel_size=runtime.data_parallel_size)
    return peak, need.total - need.parts["context"]


@pytest.mark.parametrize(
    ("ranks_of_run", "sizes", "parallel", "training", "fused"),
    [
        pytest.param(1, {}, {}, {}, False, id="plain"),
        pytest.param(1, {"num_hidden_layers": 8}, {}, {"recompute": True}, False, id="recompute"),
        pytest.param(1, {"vocab_size": 16384}, {}, {}, True, id="fused-linear"),
        pytest.param(1, {"hidden_size": 64}, {}, {"precision": "bf16"}, False, id="bf16"),
        pytest.param(2, {}, {"tensor_model_parallel_size": 2}, {}, False, id="tp2"),
        pytest.param(2, {}, {"use_distributed_optimizer": True}, {}, False, id="dp2"),
        pytest.param(
            2,
            {},
            {"pipeline_model_parallel_size": 2},
            {"micro_batch_size": 1},
            False,
            id="pp2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_training_needs_what_is_planned(  # type: ignore[no-untyped-def]
    ranks, tmp_path, ranks_of_run, sizes, parallel, training, fused
) -> None:
    results = ranks(
        ranks_of_run, measured_and_planned, tmp_path, {**SIZES, **sizes}, parallel, training, fused
    )
    # The plan is of the rank that needs most.
    measured, planned = max(results)
    assert planned == pytest.approx(measured, rel=0.15)


def saved(directory: Path, config: Any, model_class: Any) -> tuple[Any, Any]:
    """A random model in fp32, and its size as read from its config alone."""
    torch.manual_seed(3)
    config.architectures = [model_class.__name__]
    config.save_pretrained(directory)
    model = model_class(config).eval().requires_grad_(False)
    size = read_size(directory, "sources.small")
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    return model, size


MODELS = [
    pytest.param(LlamaConfig(**SIZES, max_position_embeddings=512), LlamaForCausalLM, id="llama"),
    pytest.param(
        LlamaConfig(**{**SIZES, "vocab_size": 16384}, max_position_embeddings=512),
        LlamaForCausalLM,
        id="llama-large-vocabulary",
    ),
    pytest.param(
        GPTNeoXConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
        ),
        GPTNeoXForCausalLM,
        id="gpt-neox",
    ),
]


@pytest.mark.parametrize(("config", "model_class"), MODELS)
def test_reading_needs_what_is_planned(tmp_path: Path, config: Any, model_class: Any) -> None:
    model, size = saved(tmp_path, config, model_class)
    tokens = torch.randint(0, 2048, (16, 256))
    positions = torch.arange(tokens.numel())[::2]
    with torch.inference_mode():
        logits_at(model, tokens, torch.ones_like(tokens), positions)
        peak = peak_bytes_of(lambda: logits_at(model, tokens, torch.ones_like(tokens), positions))
    need = reading_need(size, "fp32", batch_tokens=tokens.numel(), logits=len(positions))
    planned = need.total - need.parts["context"]
    assert planned == pytest.approx(peak + need.parts["weights"], rel=0.15)


@pytest.mark.parametrize(("config", "model_class"), MODELS)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_answering_needs_what_is_planned(tmp_path: Path, config: Any, model_class: Any, top_p: float) -> None:
    model, size = saved(tmp_path, config, model_class)
    draw = np.random.default_rng(1)
    rows, prompt, room = 16, 96, 32
    prompts = [
        Prompt(str(number), draw.integers(0, 2048, prompt).tolist(), room, seed=number)
        for number in range(rows)
    ]
    sampling = Sampling(frozenset(), torch.ones(size.vocab_size, dtype=torch.bool), top_p=top_p)
    work = lambda: generate(model, prompts, sampling, batch_tokens=rows * (prompt + room))  # noqa: E731
    peak = peak_bytes_of(work)
    need = answering_need(size, "fp32", rows=rows, prompt=prompt, longest=prompt + room, top_p=top_p)
    planned = need.total - need.parts["context"]
    assert planned == pytest.approx(peak + need.parts["weights"], rel=0.15)
