"""The sizes of any model that transformers knows, from its config.json alone.

The model is built on torch's meta device: modules with shapes and without memory. So the counts are exact for
every family, also for those that are no targets.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig

from megatron_fuse.errors import UserError
from megatron_fuse.model.config_file import load_config, reason

# Keys of a config for the experts of a layer, and for those that one token uses.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_USED_EXPERTS = ("num_experts_per_tok", "num_experts_per_token")
_WIDTHS = ("intermediate_size", "ffn_hidden_size", "d_ff", "n_inner")

# Bits of a quantised weight by the name of the method, if quantization_config does not state `bits`.
_BITS = {"fp8": 8, "fbgemm_fp8": 8, "compressed-tensors": 8, "mxfp4": 4}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one weight by the recipe's name of its precision."""


@dataclass(frozen=True)
class ModelSize:
    """Counts of elements.

    A token is multiplied with `multiplied` weights of the layers, and with `head` more if its logits are
    wanted.
    """

    parameters: int
    multiplied: float  # without embedding and head; of a mixture, only the experts that a token uses
    embedding: int
    head: int  # hidden size x vocabulary, also if the embedding has the same weights
    layers: int
    hidden_size: int
    ffn_width: int  # of one token in one layer; of a mixture, of all experts that it uses
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    expert_parameters: int = 0  # of all experts of all layers, in a mixture of them
    experts_per_token: int = 0
    quantised_bits: int | None = None  # of a weight in the layers; None: the weights have the recipe's dtype

    @property
    def is_mixture(self) -> bool:
        return self.expert_parameters > 0

    @property
    def cached(self) -> int:
        """Keys and values of one token in all layers, as if no layer had a sliding window."""
        return 2 * self.layers * self.key_value_heads * self.head_dim

    def weight_bytes(self, dtype: str) -> float:
        """Bytes of all weights. dtype: the recipe's; embedding and head have it also in a quantised model."""
        if self.quantised_bits is None:
            return BYTES[dtype] * self.parameters
        whole = min(self.embedding + self.head, self.parameters)
        return BYTES[dtype] * whole + self.quantised_bits / 8 * (self.parameters - whole)

    def forward_flops(self, tokens: float, mean_length: float, logits: float) -> float:
        """Floating-point operations of reading `tokens` in texts of mean_length tokens, with `logits` rows.

        Two for each weight and token. A token sees the half of its text on average, and each pair takes two
        products of head_dim elements in each head of each layer.
        """
        pairs = tokens * mean_length / 2
        return (
            2 * self.multiplied * tokens
            + 2 * self.head * logits
            + 4 * self.layers * self.heads * self.head_dim * pairs
        )


def read_size(directory: Path, where: str, *, trust_remote_code: bool = False) -> ModelSize:
    """The sizes of the model of a directory that holds config.json; nothing else is read.

    where: the recipe key of its options (`sources.mpt`), for errors. Raises UserError for a config that
    transformers does not know or from which it cannot build a decoder or an encoder.
    """
    config = load_config(
        directory, trust_remote_code=trust_remote_code, allowed_by=f"{where}.trust_remote_code: true"
    )
    return size_of(
        config, place=f"{where}.model: {directory / 'config.json'}", trust_remote_code=trust_remote_code
    )


def size_of(
    config: PreTrainedConfig, *, place: str = "the model's config", trust_remote_code: bool = False
) -> ModelSize:
    """The sizes of the model that a config describes. place: where the config is, for errors."""
    try:
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and torch raise many kinds for an unknown or impossible model
        raise UserError(f"{place}: transformers cannot make this model: {reason(error, config)}") from error
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UserError(f"{place} does not state num_attention_heads, so that the model cannot be planned")
    layers, hidden, vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
    experts, used = _first(text, _EXPERTS), _first(text, _USED_EXPERTS) or 1
    backbone = of_experts = 0
    for name, weight in model.named_parameters():
        backbone += weight.numel()
        # Names as transformers 5 gives them: `mlp.experts.gate_up_proj`. `shared_experts` serve every token.
        of_experts += weight.numel() if ".experts." in name else 0
    embedding = model.get_input_embeddings().weight.numel()
    head = vocabulary * hidden
    share = used / experts if experts else 1.0
    width = _first(text, _WIDTHS) or 4 * hidden
    return ModelSize(
        parameters=backbone + (0 if text.tie_word_embeddings else head),
        multiplied=backbone - embedding - of_experts * (1 - share),
        embedding=embedding,
        head=head,
        layers=layers,
        hidden_size=hidden,
        ffn_width=used * (_first(text, ("moe_intermediate_size",)) or width) if of_experts else width,
        heads=heads,
        key_value_heads=_first(text, ("num_key_value_heads",)) or heads,
        head_dim=_first(text, ("head_dim",)) or hidden // heads,
        vocab_size=vocabulary,
        expert_parameters=of_experts,
        experts_per_token=used if of_experts else 0,
        quantised_bits=_quantised_bits(config),
    )


def _first(config: Any, keys: tuple[str, ...]) -> int | None:
    """The first of the keys whose value is a positive integer."""
    values = (getattr(config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _quantised_bits(config: Any) -> int | None:
    """Bits of a weight by quantization_config; None if the config has none, or does not say how many."""
    stated: Any = getattr(config, "quantization_config", None)
    if not stated:
        return None
    method: dict[str, Any] = stated if isinstance(stated, dict) else stated.to_dict()
    if method.get("load_in_4bit"):
        return 4
    return method.get("bits") or (
        8 if method.get("load_in_8bit") else _BITS.get(str(method.get("quant_method")))
    )
