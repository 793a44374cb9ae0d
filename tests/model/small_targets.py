"""Small random Hugging Face models of every supported family, and the batches and losses to compare on."""

from pathlib import Path

import pytest
import torch
from fuse_kernels import sparse_kl_cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

SEQUENCE, BATCH, ENTRIES, MICRO_BATCHES = 33, 3, 5, 2
TEMPERATURE, TAIL = 2.0, "bucket"

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so short that all three bands of the scaling are in use
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
# six frequencies: of three quarters of 16 channels
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    "partial_rotary_factor": 0.75,
}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def small_config(name: str) -> PreTrainedConfig:
    """Vocabulary 1003 is no multiple of anything; 1024 needs no padding; 900 leaves the last of two shards
    mostly real.
    """
    return {
        "llama2": lambda: LlamaConfig(**_SIZES, vocab_size=1003),
        # head_dim is not hidden_size / heads; grouped queries; output tied
        "llama3": lambda: LlamaConfig(
            **_SIZES,
            vocab_size=1024,
            num_key_value_heads=2,
            head_dim=32,
            rope_parameters=LLAMA3_ROPE,
            tie_word_embeddings=True,
        ),
        # a window in all layers, and in the last two of four: less than a third of the sequence
        "mistral": lambda: MistralConfig(
            **_SIZES, vocab_size=900, num_key_value_heads=2, head_dim=24, sliding_window=10, rms_norm_eps=1e-5
        ),
        "qwen2": lambda: Qwen2Config(
            **_SIZES,
            vocab_size=1003,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=2,
        ),
        # three query heads a group, wider together than the hidden size; yarn's attention scale; untied
        "qwen3": lambda: Qwen3Config(
            **_SIZES | {"num_attention_heads": 6},
            vocab_size=1003,
            num_key_value_heads=2,
            head_dim=20,
            rope_parameters=YARN_ROPE,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=2,
        ),
        # every other layer rotates, the rest have a window; tied
        "smollm3": lambda: SmolLM3Config(
            **_SIZES,
            vocab_size=900,
            num_key_value_heads=2,
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=9,
            pad_token_id=None,
        ),
        "phi3": lambda: Phi3Config(
            **_SIZES,
            vocab_size=1003,
            num_key_value_heads=2,
            rope_parameters=LONGROPE,
            original_max_position_embeddings=64,
            sliding_window=10,
            tie_word_embeddings=True,
            pad_token_id=None,
        ),
        # a key of three heads' width against a query of six heads'
        "olmo2": lambda: Olmo2Config(
            **_SIZES | {"hidden_size": 60, "num_attention_heads": 6}, vocab_size=1003, num_key_value_heads=2
        ),
        # both kinds of layers, with rotations of their own
        "gemma3": lambda: Gemma3TextConfig(
            **_SIZES | {"hidden_size": 60, "num_attention_heads": 6},
            vocab_size=1003,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=20,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        # caps so low that both bend
        "gemma2": lambda: Gemma2Config(
            **_SIZES | {"hidden_size": 60, "num_attention_heads": 6},
            vocab_size=900,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=20,
            sliding_window=8,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=8.0,
        ),
        # weights of a token's experts that add up to 1; a window in all layers
        "mixtral": lambda: MixtralConfig(
            **_SIZES,
            vocab_size=1003,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=10,
        ),
        # narrow experts, three for a token; a norm for each head; tied
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **_SIZES,
            vocab_size=900,
            num_key_value_heads=2,
            head_dim=20,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        ),
        # weights that do not add up to 1; norms over all heads
        "olmoe": lambda: OlmoeConfig(
            **_SIZES,
            vocab_size=1003,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            pad_token_id=None,
            eos_token_id=2,
        ),
    }[name]()


DENSE = ("llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2", "gemma3", "gemma2")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
NAMES = DENSE + MIXTURES


def save_small_model(name: str, directory: Path, seed: int = 0) -> Path:
    """A model whose every parameter is random: biases of 0 and norms of 1 would hide a swapped tensor."""
    model = AutoModelForCausalLM.from_config(small_config(name))
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Norms start at 1, those of Gemma at 0.
        parameter.data.copy_(parameter + 0.2 * noise if "norm" in parameter_name else 0.15 * noise)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory with config and weights for every name."""
    root = tmp_path_factory.mktemp("targets")
    return {name: save_small_model(name, root / name) for name in NAMES}


def random_batches(vocab_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches with ignored labels, empty teacher slots and rows of weight 0. ids [b, s], the rest as
    FusionTargets.
    """
    generator = torch.Generator().manual_seed(seed)

    def one() -> dict[str, torch.Tensor]:
        shape = (BATCH, SEQUENCE)
        labels = torch.randint(vocab_size, shape, generator=generator)
        teacher_ids = torch.randint(vocab_size, (*shape, ENTRIES), generator=generator)
        teacher = torch.rand((*shape, ENTRIES), generator=generator) + 0.1
        teacher_ids[torch.rand(teacher_ids.shape, generator=generator) < 0.2] = -1
        labels[torch.rand(shape, generator=generator) < 0.2] = -100
        return {
            "ids": torch.randint(vocab_size, shape, generator=generator),
            "labels": labels,
            "teacher_ids": teacher_ids,
            "teacher_logprobs": (0.9 * teacher / teacher.sum(-1, keepdim=True)).log(),
            "ce_weight": torch.rand(shape, generator=generator)
            * (torch.rand(shape, generator=generator) < 0.7),
            "kl_weight": torch.rand(shape, generator=generator)
            * (torch.rand(shape, generator=generator) < 0.7),
        }

    return [one() for _ in range(MICRO_BATCHES)]


def expected_losses(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[6, b, s] from transformers' whole logits [b, s, v], dense, without shards and without padding."""
    rows = {key: value.flatten(0, 1) for key, value in batch.items() if key != "ids"}
    losses = sparse_kl_cross_entropy(
        logits.flatten(0, 1), **rows, temperature=TEMPERATURE, tail=TAIL, implementation="reference"
    )
    return torch.stack(losses).view(6, BATCH, SEQUENCE)
