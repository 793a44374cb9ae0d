"""Small random reward models in the file layouts of three published ones, each with its weights kept in
memory.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from small_tokenizers import CORPUS, llama_json
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from megatron_fuse.chat.templates import TEMPLATES

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@dataclass(frozen=True, eq=False)
class PublishedForm:
    """options: of the recipe; body, head [1, h] and tokenizer: what the files were made from."""

    options: dict[str, str]
    body: nn.Module
    head: Tensor
    tokenizer: PreTrainedTokenizerBase

    @property
    def directory(self) -> Path:
        return Path(self.options["model"])


def save_fsfairx(root: Path) -> PublishedForm:
    """LlamaForSequenceClassification with one label, safetensors in shards, Llama-3's manner of tokenizer
    and template.
    """
    tokenizer = _llama3_tokenizer()
    model = _wide(
        LlamaForSequenceClassification,
        LlamaConfig(vocab_size=len(tokenizer) + 3, num_labels=1, rope_theta=5e5, **SIZES),
    )
    model.save_pretrained(root / "FsfairX", max_shard_size="40KB")
    tokenizer.save_pretrained(root / "FsfairX")
    return PublishedForm({"model": str(root / "FsfairX")}, model.model, model.score.weight, tokenizer)


def save_starling(root: Path) -> PublishedForm:
    """A pickle alone, of a module that holds the language model, the same body once more, and the head;
    beside it the directory of Llama-2-chat, whose weights are others."""
    tokenizer = llama_json()
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, **SIZES
    )
    module = nn.Module()
    module.model = _wide(LlamaForCausalLM, config)
    module.transformer = module.model.model
    module.v_head = nn.Linear(32, 1, bias=False)
    (root / "Starling").mkdir(parents=True)
    old_buffers = {
        f"transformer.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)
    }
    torch.save(module.state_dict() | old_buffers, root / "Starling" / "pytorch_model.bin")
    _wide(LlamaForCausalLM, config, seed=99).save_pretrained(root / "Llama-2-chat")
    tokenizer.save_pretrained(root / "Llama-2-chat")
    options = {"model": str(root / "Starling"), "body": str(root / "Llama-2-chat")}
    return PublishedForm(options, module.transformer, module.v_head.weight, tokenizer)


def save_eurus(root: Path) -> PublishedForm:
    """A Mistral body with a sliding window, a head beside it, and code that says what they are, which
    nothing should run.
    """
    tokenizer = llama_json(metaspace=True)
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=12, **SIZES)
    body, head = _wide(MistralModel, config), torch.randn(1, 32)
    directory = root / "Eurus"
    directory.mkdir(parents=True)
    tensors = {f"model.{name}": tensor for name, tensor in body.state_dict().items()} | {
        "regression_head.weight": head
    }
    write_shards(directory, tensors)
    tokenizer.save_pretrained(directory)
    code = {
        "architectures": ["EurusRewardModel"],
        "auto_map": {"AutoModel": "modeling_eurus_rm.EurusRewardModel"},
    }
    (directory / "config.json").write_text(json.dumps(config.to_dict() | code))
    (directory / "modeling_eurus_rm.py").write_text(
        "raise RuntimeError('code that came with the model was run')\n"
    )
    return PublishedForm({"model": str(directory)}, body, head, tokenizer)


SAVE: dict[str, Callable[[Path], PublishedForm]] = {
    "classifier": save_fsfairx,
    "value_head": save_starling,
    "regression_head": save_eurus,
}


def write_shards(directory: Path, tensors: dict[str, Tensor], suffix: str = "safetensors") -> None:
    """Two shards with their index: model-0000N-of-00002.safetensors, or pytorch_model-0000N-of-00002.bin."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    file_of = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        path = directory / f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {name: tensors[name].detach().clone() for name in names}
        save_file(part, path, metadata={"format": "pt"}) if suffix == "safetensors" else torch.save(
            part, path
        )
        file_of |= dict.fromkeys(names, path.name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _wide(model_class: type, config: object, seed: int = 5) -> nn.Module:
    """Random weights so wide that every token of a conversation moves its reward."""
    torch.manual_seed(seed)
    model = model_class(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.25)
    return model


def _llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds BOS, and a template that prints one."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=LLAMA3_SPECIALS, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    bos = LLAMA3_SPECIALS[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<|eot_id|>", chat_template=TEMPLATES["llama3"]
    )
