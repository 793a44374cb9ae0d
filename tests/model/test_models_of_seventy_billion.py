"""Llama-3.1-70B and Qwen2.5-72B by their configurations: sizes, layouts, slices of every weight, and one real
layer at full width.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import save_model, save_tokenizer, small_recipe, write_rows
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fuse.capture.megatron_layout import check_processes
from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, check_layout, read_architecture
from megatron_fuse.model.expected_weights import hugging_face_shapes
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.model.weight_blocks import weight_blocks
from megatron_fuse.pipeline import check_files
from megatron_fuse.pipeline.plan_table import print_plan
from megatron_fuse.stages import Context

# As published, without the keys that no reader here uses.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "torch_dtype": "bfloat16",
    },
    "qwen": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    },
}
PARAMETERS = {"llama": 70_553_706_496, "qwen": 72_706_203_648}
META = torch.device("meta")


def write_config(directory: Path, name: str, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    return directory


@pytest.fixture(params=CONFIGS)
def architecture(request: pytest.FixtureRequest, tmp_path: Path) -> Architecture:
    return read_architecture(write_config(tmp_path, request.param))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    shapes = hugging_face_shapes(read_architecture(write_config(tmp_path, name)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
        )
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
    assert sum(map(prod, shapes.values())) == PARAMETERS[name]


def write_sparse_weights(directory: Path, shards: int = 80) -> None:
    """Weight files with true headers and an index. The values take no space on the disk.

    shards: as many as it takes to keep each below 5 GB, as published ones are: the system refuses to map a
    single file that is larger than its memory.
    """
    shapes = list(hugging_face_shapes(read_architecture(directory)).items())
    file_of = {}
    for shard in range(shards):
        path, header, end = directory / f"model-{shard:05d}.safetensors", {}, 0
        for name, shape in shapes[len(shapes) * shard // shards : len(shapes) * (shard + 1) // shards]:
            size = 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            file_of[name] = path.name
        assert end < 5e9
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_with_such_a_source_is_planned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big, small = write_config(tmp_path / "big", name), save_model(tmp_path / "small", "llama")
    save_tokenizer(big)
    write_sparse_weights(big)
    assert count_parameters(big) == PARAMETERS[name]
    data = write_rows(
        tmp_path / "data.jsonl", [{"instruction": "Add 1 and 2.", "output": "That makes 3."}] * 3
    )
    parallel = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4}
    source = {"model": str(big), "backend": "megatron", "parallel": parallel}
    recipe = small_recipe(tmp_path / "run", data, small, {"big": source})
    check_files(recipe)
    check_processes(recipe, "big", 64)
    with pytest.raises(UserError, match="Set --nproc-per-node to a multiple of 32"):
        check_processes(recipe, "big", 8)
    print_plan(Context(recipe), 32)
    assert "captures/big/training " in capsys.readouterr().out


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 4), (4, 2), (8, 1), (8, 4), (8, 80)])
def test_layouts_that_fit(architecture: Architecture, tensor: int, pipeline: int) -> None:
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    check_layout(architecture, **sizes, seq_length=8192)


@pytest.mark.parametrize(
    ("tensor", "message"), [(16, "does not divide num_key_value_heads"), (3, "does not divide")]
)
def test_layouts_that_do_not_fit(architecture: Architecture, tensor: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(architecture, tensor_model_parallel_size=tensor)


def megatron_shapes(architecture: Architecture, tensor: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter of a tensor-parallel rank that has all layers."""
    a = architecture
    heads, groups = a.num_attention_heads // tensor, a.num_query_groups // tensor
    rows, ffn = (heads + 2 * groups) * a.head_dim, a.ffn_hidden_size // tensor
    vocabulary = (a.padded_vocab_size // tensor, a.hidden_size)
    shapes = {"embedding.word_embeddings.weight": vocabulary, "output_layer.weight": vocabulary}
    shapes["decoder.final_layernorm.weight"] = (a.hidden_size,)
    for layer in range(a.num_layers):
        prefix = f"decoder.layers.{layer}."
        bias = {"self_attention.linear_qkv.bias": (rows,)} if a.qkv_bias else {}
        of_layer = {
            "input_layernorm.weight": (a.hidden_size,),
            "self_attention.linear_qkv.weight": (rows, a.hidden_size),
            **bias,
            "self_attention.linear_proj.weight": (a.hidden_size, heads * a.head_dim),
            "pre_mlp_layernorm.weight": (a.hidden_size,),
            "mlp.linear_fc1.weight": (2 * ffn, a.hidden_size),
            "mlp.linear_fc2.weight": (a.hidden_size, ffn),
        }
        shapes |= {prefix + name: shape for name, shape in of_layer.items()}
    return shapes


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_the_slices_of_all_ranks_are_the_whole_model(architecture: Architecture, tensor: int) -> None:
    """On tensors without values: every element of a split tensor belongs to one rank, and a norm to all."""
    theirs = {
        name: torch.empty(shape, device=META) for name, shape in hugging_face_shapes(architecture).items()
    }
    taken: dict[str, list[tuple[int, int]]] = {name: [] for name in theirs}
    for rank in range(tensor):
        for name, shape in megatron_shapes(architecture, tensor).items():
            parameter = torch.empty(shape, device=META)
            for block in weight_blocks(name, architecture, rank, tensor):
                ours = parameter.narrow(block.dim, block.at, block.size)
                ours.copy_(theirs[block.tensor].narrow(block.dim, block.start, block.size))
                taken[block.tensor].append((block.start, block.start + block.size))
    for name, parts in taken.items():
        length = theirs[name].shape[1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0]
        if "norm" in name:
            assert parts == [(0, length)] * tensor
            continue
        bounds = sorted(parts)
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])], name
        assert bounds[-1][1] == length, name


def layer_output(directory: Path, ids: list[int]) -> np.ndarray | None:
    """The logits of a token sequence, on the ranks' first one."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_fuse.runtime import start_runtime

    runtime = start_runtime(tensor_model_parallel_size=2)
    from megatron_fuse.capture.megatron_reading import build_source
    from megatron_fuse.model.conversion import load_hugging_face_weights

    architecture = read_architecture(directory)
    model = build_source(architecture, "fp32", tensor_model_parallel_size=2)
    load_hugging_face_weights([model], directory)
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logits = gather_from_tensor_model_parallel_region(
            model(tokens, torch.arange(len(ids))[None], None).contiguous()
        )
    return logits[0, :, : architecture.vocab_size].numpy() if runtime.rank == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_at_full_width(ranks, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One layer of random weights, of 0.86 billion parameters, divided over two ranks. 10 GB of memory."""
    directory = write_config(tmp_path, name, num_hidden_layers=1, vocab_size=1003)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in hugging_face_shapes(read_architecture(directory)).items():
        # Rows of norm about 1, so that activations keep their size; biases and norms that count.
        values = torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5, generator=generator)
        tensors[key] = 1 + values if "norm" in key else values * (50 if key.endswith("bias") else 1)
    tensors["model.embed_tokens.weight"] *= 50
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    del tensors
    ids = torch.randint(1003, (40,), generator=generator).tolist()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    del model
    ours, _ = ranks(2, layer_output, directory, ids)
    assert np.abs(theirs).max() > 1, "logits near 0 would make the tolerance meaningless"
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
