"""The GPTModel built from a config computes what transformers computes, at every layout: logits, losses
and all gradients.
"""

# ruff: noqa: F401, F811  (small_models is a fixture, imported and then named as an argument)

import itertools

import numpy as np
import pytest
import small_targets as small
import torch
from published_models import PUBLISHED
from small_targets import small_models
from transformers import AutoModelForCausalLM, LlamaConfig

SEED = 7
# tensor, pipeline, virtual: alone, each kind of split, and all that change where a weight lies
LAYOUTS = {
    "one": (1, 1, None),
    "tp2": (2, 1, None),
    "pp2": (1, 2, None),
    "pp2-vpp2": (1, 2, 2),
    "tp2-pp2": (2, 2, None),
}


def start(layout, model_dir, **options):
    """On a rank: the architecture and the config of a model at a layout."""
    from megatron_fuse.model.architecture import read_architecture
    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.runtime import start_runtime

    tensor, pipeline, virtual = layout
    start_runtime(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
    )
    architecture = read_architecture(model_dir)
    config = transformer_config(
        architecture,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        **options,
    )
    return architecture, config


def forward_logits(model_dir):
    from megatron_fuse.model.conversion import load_hugging_face_weights
    from megatron_fuse.model.gpt import build_model

    architecture, config = start((1, 1, None), model_dir)
    model = build_model(architecture, config, seq_length=small.SEQUENCE)
    load_hugging_face_weights([model], model_dir)
    ids = small.random_batches(architecture.vocab_size, SEED)[0]["ids"]
    with torch.no_grad():
        return model(ids, None, None)[..., : architecture.vocab_size].numpy()


@pytest.mark.parametrize("name", small.NAMES)
def test_logits_equal_transformers(ranks, small_models, name):
    ours = torch.from_numpy(ranks(1, forward_logits, small_models[name])[0])
    model = AutoModelForCausalLM.from_pretrained(small_models[name])
    ids = small.random_batches(model.config.vocab_size, SEED)[0]["ids"]
    with torch.no_grad():
        theirs = model(ids).logits
    assert theirs.abs().max() > 1, "logits near 0 would make the tolerance meaningless"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def train_once(layout, model_dir, fused_linear=False):
    """Losses of each micro-batch (last stage only), and this rank's part of every weight and gradient by
    Hugging Face name.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_fuse.model.conversion import load_hugging_face_weights, parameter_blocks
    from megatron_fuse.model.gpt import FusionLossOptions, FusionTargets, build_model_chunks

    architecture, config = start(layout, model_dir)
    options = FusionLossOptions(temperature=small.TEMPERATURE, tail=small.TAIL, fused_linear=fused_linear)
    chunks = build_model_chunks(architecture, config, seq_length=small.SEQUENCE, loss_options=options)
    load_hugging_face_weights(chunks, model_dir)

    def forward_step(batches, model):
        batch = dict(next(batches))
        output = model(batch.pop("ids"), None, None, labels=FusionTargets(**batch))
        # Megatron divides by the number of micro-batches; the model counts on an upstream gradient of 1.
        return output, lambda losses: (
            losses[0].sum() * small.MICRO_BATCHES,
            {"losses": losses.detach().numpy()},
        )

    batches = small.random_batches(architecture.vocab_size, SEED)
    report = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=small.SEQUENCE,
        micro_batch_size=small.BATCH,
        forward_only=False,
    )
    first_tensor_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    parts = []
    for chunk in chunks:
        for parameter, blocks in parameter_blocks(chunk):
            for block in blocks:
                place = (block.dim, block.at, block.size)
                weight, gradient = parameter.detach().narrow(*place), parameter.grad.narrow(*place)
                # Norms are the same on all ranks, with the whole gradient. Those of queries and keys have a
                # part of it on each.
                summed = block.tensor.endswith(("q_norm.weight", "k_norm.weight"))
                if getattr(parameter, "tensor_model_parallel", False) or summed or first_tensor_rank:
                    parts.append((block, weight.numpy(), gradient.numpy()))
    return [micro["losses"] for micro in report], parts


# Untied; untied with a window; tied with biases, and windows in some layers; one of each further family.
TRAINED = ("llama2", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2", "gemma3", "gemma2")
FIRST = ("llama2", "mistral", "qwen2")


def trained_at_layouts():
    """A plain run has all layouts of the first families, and of the others the one that splits everything.
    The loss that is fused with the output layer is there at that layout.
    """
    for layout, name, fused_linear in itertools.product(LAYOUTS, TRAINED, (False, True)):
        first, splits_all = name in FIRST, layout == "tp2-pp2"
        plain = first and splits_all if fused_linear else first or splits_all
        words = f"{layout}-{name}-{'fused linear' if fused_linear else 'logits'}"
        yield pytest.param(layout, name, fused_linear, marks=[] if plain else pytest.mark.slow, id=words)


@pytest.fixture(scope="module")
def expected(small_models):
    """By model: transformers' weights, losses and gradients under the same batches."""
    result = {}
    for name in TRAINED:
        model = AutoModelForCausalLM.from_pretrained(small_models[name])
        losses = []
        for batch in small.random_batches(model.config.vocab_size, SEED):
            losses.append(small.expected_losses(model(batch["ids"]).logits, batch))
            losses[-1][0].sum().backward()
        weights = dict(model.named_parameters())
        result[name] = (weights, [loss.detach() for loss in losses])
    return result


@pytest.mark.parametrize(("layout", "name", "fused_linear"), trained_at_layouts())
def test_losses_weights_and_gradients_equal_transformers(
    ranks, small_models, expected, layout, name, fused_linear
):
    tensor, pipeline, _ = LAYOUTS[layout]
    results = ranks(tensor * pipeline, train_once, LAYOUTS[layout], small_models[name], fused_linear)
    weights, losses = expected[name]

    last_stage = [found for found, _ in results if found]
    assert len(last_stage) == tensor, "every tensor rank of the last stage reports"
    for found in last_stage:
        # fp32 through 4 layers and two summation orders; the losses themselves are about 10
        torch.testing.assert_close(
            torch.from_numpy(np.stack(found)), torch.stack(losses), atol=2e-4, rtol=1e-5
        )

    gradients = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    seen = {key: torch.zeros(weight.shape, dtype=torch.bool) for key, weight in weights.items()}
    for _, parts in results:
        for block, weight, gradient in parts:
            place = (block.dim, block.start, block.size)
            assert torch.equal(torch.from_numpy(weight), weights[block.tensor].narrow(*place)), (
                f"{block} is not the same bits"
            )
            # A tied weight has two parts under PP.
            gradients[block.tensor].narrow(*place).add_(torch.from_numpy(gradient))
            seen[block.tensor].narrow(*place).fill_(True)
    for key, weight in weights.items():
        assert seen[key].all(), f"{key} is on no rank"
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(
            gradients[key], weight.grad, atol=2e-5 * scale, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def tensor_parallel_marks(model_dir):
    from megatron_fuse.model.gpt import build_model

    def marks(initialize):
        architecture, config = start((2, 1, None), model_dir, perform_initialization=initialize)
        model = build_model(architecture, config, seq_length=small.SEQUENCE)
        names = ("tensor_model_parallel", "partition_dim", "partition_stride")
        return {key: tuple(getattr(p, n, None) for n in names) for key, p in model.named_parameters()}

    return marks(True), marks(False)


def test_weights_that_are_not_initialised_are_marked_as_sharded_all_the_same(ranks, small_models):
    """The gradient norm counts an unmarked shard on rank 0 alone."""
    for initialised, unset in ranks(2, tensor_parallel_marks, small_models["qwen2"]):
        assert unset == initialised
        assert initialised["decoder.layers.0.mlp.linear_fc2.weight"] == (True, 1, 1)


def half_precision_losses(model_dir):
    from megatron.core.transformer.module import Float16Module

    from megatron_fuse.model.conversion import load_hugging_face_weights
    from megatron_fuse.model.gpt import FusionTargets, build_model

    architecture, config = start((1, 1, None), model_dir, params_dtype=torch.bfloat16)
    model = Float16Module(config, build_model(architecture, config, seq_length=small.SEQUENCE))
    load_hugging_face_weights([model], model_dir)
    batch = small.random_batches(architecture.vocab_size, SEED)[0]
    output = model(batch.pop("ids"), None, None, labels=FusionTargets(**batch).to("cpu"))
    output[0].sum().backward()
    return (
        str(output.dtype),
        list(output.shape),
        output[1].detach().numpy(),
        {str(p.grad.dtype) for p in model.parameters()},
    )


def test_losses_are_fp32_in_a_wrapped_bf16_model(ranks, small_models, expected):
    dtype, shape, cross_entropy, gradient_dtypes = ranks(1, half_precision_losses, small_models["llama2"])[0]
    assert (dtype, shape, gradient_dtypes) == (
        "torch.float32",
        [6, small.BATCH, small.SEQUENCE],
        {"torch.bfloat16"},
    )
    # bf16 keeps 8 bits: 4 layers of it move a cross entropy of about 10 by some hundredths
    assert np.abs(cross_entropy - expected["llama2"][1][0][1].numpy()).mean() < 0.2


def embedding_scales(model_dir):
    from megatron_fuse.model.gpt import build_model

    scales = []
    for dtype in (torch.float32, torch.bfloat16):
        architecture, config = start((1, 1, None), model_dir, params_dtype=dtype)
        scales.append(build_model(architecture, config, seq_length=small.SEQUENCE).embedding_scale)
    return scales


def test_the_scale_of_embeddings_is_rounded_as_in_transformers(ranks, small_models):
    model = AutoModelForCausalLM.from_pretrained(small_models["gemma3"])
    scale = model.model.embed_tokens.embed_scale
    assert scale.bfloat16() != scale
    expected = [scale.item(), scale.bfloat16().item()]
    assert ranks(1, embedding_scales, small_models["gemma3"])[0] == expected


def meta_shapes(model_dir):
    from megatron_fuse.model.conversion import hugging_face_shapes, parameter_blocks
    from megatron_fuse.model.gpt import build_model

    architecture, config = start((1, 1, None), model_dir, params_dtype=torch.bfloat16)
    with torch.device("meta"):
        model = build_model(architecture, config, seq_length=2048)
    assert all(parameter.is_meta for parameter in model.parameters())
    read = {}
    for parameter, blocks in parameter_blocks(model):
        for block in blocks:
            assert block.at + block.size <= parameter.shape[block.dim]
            others = parameter.numel() // parameter.shape[block.dim]
            read[block.tensor] = read.get(block.tensor, 0) + block.size * others
    shapes = hugging_face_shapes(architecture)
    assert read == {name: int(np.prod(shape)) for name, shape in shapes.items()}
    return sum(parameter.numel() for parameter in model.parameters()), architecture.padded_vocab_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_number_of_parameters(ranks, tmp_path, name):
    """Shapes only, on the meta device, in transformers and in Megatron."""
    count, config = PUBLISHED[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    config.architectures = [type(theirs).__name__]
    config.save_pretrained(tmp_path)
    ours, padded_vocab_size = ranks(1, meta_shapes, tmp_path)[0]
    matrices = 1 if config.tie_word_embeddings else 2
    assert ours - matrices * (padded_vocab_size - config.vocab_size) * config.hidden_size == count


def test_vicuna_7b_fits_its_real_config(ranks, tmp_path):
    """Shapes only, on the meta device. 6738415616 parameters is what the model card's checkpoint holds."""
    from test_architecture import VICUNA_7B

    LlamaConfig(**VICUNA_7B).save_pretrained(tmp_path)
    assert ranks(1, meta_shapes, tmp_path)[0] == (6_738_415_616, 32000)
