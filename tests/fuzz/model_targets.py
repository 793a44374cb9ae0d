"""Model directories: config, index, headers and bodies of weight files, as targets, sources, reward models
and parts of a merge.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from campaign import FuzzTarget
from safetensors.torch import load_file, save_file
from small_models import save_model
from target_families import FAMILIES, MIXTURES
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from megatron_fuse.huggingface.fingerprints import model_fingerprint
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.merging import Merge, merge_models
from megatron_fuse.model.architecture import check_layout, read_architecture
from megatron_fuse.model.config_file import check_model_directory
from megatron_fuse.model.expected_weights import check_weights, refuse_non_finite
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.recipe import RewardModelOptions, SourceOptions
from megatron_fuse.scoring.reward_models import load_reward_model, reward_model_fingerprint

_FILES = ("**/config.json", "**/generation_config.json", "**/*.index.json", "**/*.safetensors", "**/*.bin")
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_TARGETS: dict[str, tuple[PreTrainedConfig, str]] = {
    "llama": (LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE), "safetensors"),
    "mistral": (MistralConfig(**_SIZES, head_dim=16, sliding_window=7), "bin"),
    "qwen2": (
        Qwen2Config(**_SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=7),
        "whole",
    ),
}
_FIRST = tuple(_TARGETS)  # each in another form of weight files
_TARGETS |= {
    # Four layers, for the families with kinds of layers.
    name: (config_class(**_SIZES | {"num_hidden_layers": 4}, **further), "whole")
    for name, (config_class, further) in (FAMILIES | MIXTURES).items()
    if name not in _FIRST
}


def _in_shards(directory: Path, suffix: str) -> None:
    """Two shards with their index in the place of model.safetensors."""
    whole = directory / "model.safetensors"
    tensors, stem = load_file(whole), "model" if suffix == "safetensors" else "pytorch_model"
    whole.unlink()
    file_of = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        path = directory / f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {name: tensors[name] for name in names}
        save_file(part, path, metadata={"format": "pt"}) if suffix == "safetensors" else torch.save(
            part, path
        )
        file_of |= dict.fromkeys(names, path.name)
    index = {"metadata": {"total_size": 1}, "weight_map": file_of}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _make_target(name: str, directory: Path) -> None:
    config, container = _TARGETS[name]
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    if container != "whole":
        _in_shards(directory, container)


def _read_target(directory: Path) -> None:
    """What is asked of a target before training, and every weight read as training does."""
    architecture, files = read_architecture(directory), WeightFiles(directory)
    check_model_directory(directory)
    check_layout(architecture, tensor_model_parallel_size=2, seq_length=32)
    check_weights(files, architecture)
    for name in files.file_of:
        shape = files.shape(name)
        refuse_non_finite(files.read(name, 0, 0, shape[0] if shape else 0), files.place(name))


def _make_source(family: str, container: str, directory: Path) -> None:
    save_model(directory / "model", family)
    if container != "whole":
        _in_shards(directory / "model", container)


def _read_source(directory: Path) -> None:
    """Identified, loaded, and asked for one distribution."""
    path = directory / "model"
    model_fingerprint(path)
    model = load_causal_lm(SourceOptions(model=str(path), dtype="fp32"), where="sources.s")
    assert model(torch.tensor([[5, 6, 7]])).logits.shape[:2] == (1, 3)


def _make_reward_model(form: str, directory: Path) -> None:
    save_model(directory / "model", "llama", reward=form == "classifier")
    if form == "classifier":
        return
    path = directory / "model/model.safetensors"
    tensors = load_file(path) | {
        "v_head.weight": torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    }
    save_file(tensors, path, metadata={"format": "pt"})
    _in_shards(directory / "model", "bin")


def _read_reward_model(directory: Path) -> None:
    options = RewardModelOptions(model=str(directory / "model"), dtype="fp32")
    reward_model_fingerprint(options, "reward")
    reward_model = load_reward_model(options, "reward")
    hidden = reward_model.backbone(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
    assert reward_model.head(hidden.float()).shape == (1, 3, 1)


def _make_merge(directory: Path) -> None:
    save_model(directory / "a", "llama", seed=1)
    save_model(directory / "b", "llama", seed=2)
    shutil.copyfile(directory / "a/tokenizer.json", directory / "b/tokenizer.json")


def _read_merge(directory: Path) -> None:
    output = directory / "out"
    shutil.rmtree(output, ignore_errors=True)
    merge_models(Merge("linear", (directory / "a", directory / "b")), output)
    files = WeightFiles(output)
    check_weights(files, read_architecture(output))


TARGETS = [
    *(
        FuzzTarget(
            f"model-target-{name}",
            partial(_make_target, name),
            _read_target,
            _FILES,
            2 if name in _FIRST else 0.5,
        )
        for name in _TARGETS
    ),
    *(
        FuzzTarget(
            f"model-source-{family}", partial(_make_source, family, container), _read_source, _FILES, 0.5
        )
        for family, container in (("llama", "whole"), ("mpt", "bin"), ("gpt_neox", "safetensors"))
    ),
    *(
        FuzzTarget(f"model-judge-{form}", partial(_make_reward_model, form), _read_reward_model, _FILES, 0.5)
        for form in ("classifier", "value_head")
    ),
    FuzzTarget(
        "model-merge",
        _make_merge,
        _read_merge,
        ("[ab]/config.json", "[ab]/generation_config.json", "[ab]/*.safetensors"),
        0.2,
    ),
]
