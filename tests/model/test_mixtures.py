"""Mixtures of experts compute what transformers computes, at every layout: losses, gradients, all bits."""

# ruff: noqa: F401, F811  (small_models is a fixture, imported and then named as an argument)

import gc
from functools import partial

import numpy as np
import pytest
import small_targets as small
import torch
from rank_pool import threads_of_gloo
from small_targets import small_models
from transformers import AutoModelForCausalLM, PreTrainedModel

SEED = 11
LENGTH, TEXTS, MICRO_BATCHES = 32, 2, 4  # 32 positions: two tensor ranks share them
# Number of ranks, and sizes by Megatron's names. Expert parallelism takes data-parallel ranks, or, with an
# expert tensor size of 1, tensor-parallel ranks.
LAYOUTS = {
    "one": (1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-ep2-folded": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
    "tp2-ep2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "pp2-ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def batches(vocab_size: int) -> list[dict[str, torch.Tensor]]:
    one_after_the_other = (
        batch for seed in range(MICRO_BATCHES) for batch in small.random_batches(vocab_size, SEED + seed)[:1]
    )
    return [
        {key: value[:TEXTS, :LENGTH].contiguous() for key, value in batch.items()}
        for batch in one_after_the_other
    ]


def train_once(sizes, model_dir):
    """On a rank: its micro-batches' losses (last stage only), and its part of every weight and gradient."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_fuse.model.architecture import read_architecture
    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.model.conversion import load_hugging_face_weights, parameter_blocks
    from megatron_fuse.model.gpt import FusionLossOptions, FusionTargets, build_model_chunks
    from megatron_fuse.runtime import start_runtime

    start_runtime(**sizes)
    architecture = read_architecture(model_dir)
    config = transformer_config(architecture, **sizes)
    assert config.sequence_parallel == (sizes.get("tensor_model_parallel_size", 1) > 1)
    options = FusionLossOptions(temperature=small.TEMPERATURE, tail=small.TAIL)
    chunks = build_model_chunks(architecture, config, seq_length=LENGTH, loss_options=options)
    load_hugging_face_weights(chunks, model_dir)
    wrapped = [
        DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk)
        for chunk in chunks
    ]
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = batches(architecture.vocab_size)[rank::ranks]
    config.finalize_model_grads_func = finalize_model_grads
    for chunk in wrapped:
        chunk.zero_grad_buffer()

    def forward_step(data, model):
        batch = dict(next(data))
        output = model(batch.pop("ids"), None, None, labels=FusionTargets(**batch))
        # Megatron divides by the number of micro-batches, and data parallelism by its ranks.
        return output, lambda losses: (
            losses[0].sum() * MICRO_BATCHES,
            {"losses": losses.detach().numpy()},
        )

    report = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(own),
        model=wrapped,
        num_microbatches=len(own),
        seq_length=LENGTH,
        micro_batch_size=TEXTS,
        forward_only=False,
    )
    parts = []
    for chunk in chunks:
        for parameter, blocks in parameter_blocks(chunk):
            for block in blocks:
                place = (block.dim, block.at, block.size)
                gradient = parameter.main_grad.narrow(*place)
                parts.append((block, parameter.detach().narrow(*place).numpy(), gradient.numpy()))
    return (rank, ranks), [micro["losses"] for micro in report], parts


def by_name_in_files(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and gradient by the names of the weight files, which have every expert by itself."""
    found = {}
    is_mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, parameter in model.named_parameters():
        if is_mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        pair = (parameter.detach(), parameter.grad)
        layer, experts, kind = name.partition(".experts.")
        if not experts:
            found[name] = pair
        elif kind == "down_proj":
            for number in range(len(parameter)):
                found[f"{layer}.experts.{number}.{down}.weight"] = tuple(part[number] for part in pair)
        else:
            for number in range(len(parameter)):
                halves = [part[number].chunk(2) for part in pair]
                found[f"{layer}.experts.{number}.{gate}.weight"] = tuple(half[0] for half in halves)
                found[f"{layer}.experts.{number}.{up}.weight"] = tuple(half[1] for half in halves)
    return found


@pytest.fixture(scope="module")
def expected(small_models):
    """By model: transformers' weights and gradients by name, and the losses of every micro-batch."""
    result = {}
    for name in small.MIXTURES:
        model = AutoModelForCausalLM.from_pretrained(small_models[name])
        losses = []
        for batch in batches(model.config.vocab_size):
            rows = {key: value.flatten(0, 1) for key, value in batch.items() if key != "ids"}
            found = small.sparse_kl_cross_entropy(
                model(batch["ids"]).logits.flatten(0, 1),
                **rows,
                temperature=small.TEMPERATURE,
                tail=small.TAIL,
                implementation="reference",
            )
            losses.append(torch.stack(found).view(6, TEXTS, LENGTH))
            losses[-1][0].sum().backward()
        result[name] = by_name_in_files(model), [loss.detach() for loss in losses]
    return result


def mixtures_at_layouts():
    """A plain run has every mixture, and every layout of one of them."""
    plain = [("qwen3_moe", layout) for layout in LAYOUTS]
    plain += [("mixtral", "tp2-ep2"), ("olmoe", "tp2-ep2-folded")]
    for name in small.MIXTURES:
        for layout in LAYOUTS:
            marks = [] if (name, layout) in plain else pytest.mark.slow
            yield pytest.param(layout, name, marks=marks, id=f"{layout}-{name}")


@pytest.mark.parametrize(("layout", "name"), mixtures_at_layouts())
def test_losses_weights_and_gradients_equal_transformers(ranks, small_models, expected, layout, name):
    count, sizes = LAYOUTS[layout]
    results = ranks(count, train_once, sizes, small_models[name])
    weights, losses = expected[name]

    found = {}
    for (rank, of), own, _ in results:
        for number, micro_batch in zip(range(rank, MICRO_BATCHES, of), own, strict=bool(own)):
            found[number] = torch.from_numpy(micro_batch)
    torch.testing.assert_close(
        torch.stack([found[number] for number in range(MICRO_BATCHES)]),
        torch.stack(losses),
        atol=2e-4,
        rtol=1e-5,
    )

    seen = {key: torch.zeros(weight.shape, dtype=torch.bool) for key, (weight, _) in weights.items()}
    for _, _, parts in results:
        for block, weight, gradient in parts:
            key, place = block.tensor, (block.dim, block.start, block.size)
            whole, whole_gradient = weights[key]
            assert torch.equal(torch.from_numpy(weight), whole.narrow(*place)), f"{block}: other bits"
            # Every rank that holds a weight has its whole gradient, so that all ranks make the same step.
            scale = whole_gradient.abs().max().item()
            torch.testing.assert_close(
                torch.from_numpy(gradient),
                whole_gradient.narrow(*place),
                atol=2e-5 * scale,
                rtol=1e-4,
                msg=lambda m, block=block: f"{block}: {m}",
            )
            seen[key].narrow(*place).fill_(True)
    for key, everywhere in seen.items():
        assert everywhere.all(), f"{key} is on no rank"


def router_gradient(model_dir, coefficient):
    """On a rank: the gradient of the router from the auxiliary loss alone, over two micro-batches."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_fuse.model.architecture import read_architecture
    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.model.conversion import load_hugging_face_weights
    from megatron_fuse.model.gpt import FusionGPTModel, FusionTargets, build_model
    from megatron_fuse.runtime import start_runtime

    start_runtime()
    architecture = read_architecture(model_dir)
    config = transformer_config(architecture, moe_aux_loss_coeff=coefficient)
    model: FusionGPTModel = build_model(architecture, config, seq_length=LENGTH)
    load_hugging_face_weights([model], model_dir)

    def forward_step(data, model):
        batch = dict(next(data))
        batch["ce_weight"] = batch["kl_weight"] = torch.zeros_like(batch["ce_weight"])
        output = model(batch.pop("ids"), None, None, labels=FusionTargets(**batch))
        return output, lambda losses: (losses[0].sum(), {})

    own = batches(architecture.vocab_size)[:2]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(own),
        model=[model],
        num_microbatches=len(own),
        seq_length=LENGTH,
        micro_batch_size=TEXTS,
        forward_only=False,
    )
    return model.decoder.layers[0].mlp.router.weight.grad.numpy()


def test_the_auxiliary_loss_is_that_of_the_switch_transformer(ranks, tmp_path):
    """Coefficient x experts x sum of (share of tokens) x (mean probability): Fedus et al. 2021, section 2.2.

    The share is of all choices of experts. The gradient is the mean of the micro-batches'.
    """
    config = small.small_config("mixtral")
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.model.layers[0].mlp.gate.weight, std=0.3)
    model.save_pretrained(tmp_path)
    coefficient, chosen = 0.7, config.num_experts_per_tok
    losses = []
    for batch in batches(config.vocab_size)[:2]:
        (logits,) = model(batch["ids"], output_router_logits=True).router_logits
        probabilities = logits.double().softmax(-1)
        one_hot = torch.nn.functional.one_hot(probabilities.topk(chosen).indices, config.num_local_experts)
        shares = one_hot.sum(1).double().mean(0) / chosen
        losses.append(coefficient * config.num_local_experts * (shares * probabilities.mean(0)).sum())
    torch.stack(losses).mean().backward()
    expected = model.model.layers[0].mlp.gate.weight.grad
    assert expected.abs().max() > 1e-3
    found = torch.from_numpy(ranks(1, router_gradient, tmp_path, coefficient)[0])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert not ranks(1, router_gradient, tmp_path, 0.0)[0].any()


def left_after_two_runs(model_dir):
    """On a rank: the models and the threads of gloo that are left after each of two runs.

    A run before them is not counted: an earlier test may have left a model, which is freed by it.
    """
    from megatron_fuse.model.gpt import FusionGPTModel
    from megatron_fuse.runtime import stop_runtime

    counts = []
    train = partial(train_once, {})
    for run in (train, train, partial(router_gradient, coefficient=0.5)):
        run(model_dir=model_dir)
        stop_runtime()
        gc.collect()
        models = sum(type(each) is FusionGPTModel for each in gc.get_objects())
        counts.append((models, threads_of_gloo()))
    return counts[1:]


def test_nothing_is_left_of_a_model_that_has_been_trained(ranks, small_models):
    """Neither the model, which its graph could keep, nor the groups of its auxiliary loss."""
    assert ranks(1, left_after_two_runs, small_models["mixtral"]) == [[(0, 0), (0, 0)]]
