"""Small random models of the families in use, and what each can be here: a source, a target, a reward model.

A cell says what a run found. `yes` means that the numbers are those of transformers alone: log-probabilities
and greedy answers of a source, weights of a target after import and export (every bit), rewards of a reward
model.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file
from small_models import save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.capture.shards import Conversation
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.recipe import RewardModelOptions, SourceOptions, make_recipe
from megatron_fuse.scoring.conversations import score_conversations
from megatron_fuse.scoring.reward_models import load_reward_model
from megatron_fuse.sources.generation import Prompt, Sampling, generate

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WHOLE_HEADS = SIZES | {"num_key_value_heads": 4}
EXPERTS = SIZES | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
FAMILIES: dict[str, dict] = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": None},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gemma": SIZES | {"head_dim": 8},
    "gemma2": SIZES | {"head_dim": 8},
    "gemma3_text": SIZES | {"head_dim": 8},
    "phi": SIZES,
    "phi3": SIZES | {"pad_token_id": None},
    "olmo2": SIZES,
    "granite": SIZES,
    "cohere": SIZES,
    "smollm3": SIZES,
    "glm": SIZES | {"head_dim": 8, "pad_token_id": None},
    "glm4": SIZES | {"head_dim": 8, "pad_token_id": None},
    "stablelm": SIZES,
    "starcoder2": SIZES,
    "nemotron": SIZES | {"head_dim": 8},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "gpt_oss": EXPERTS | {"head_dim": 8},
    "gpt_neox": WHOLE_HEADS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    | {"max_position_embeddings": 128},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
}
ROLES = ("source: captures", "source: answers", "target", "reward model")

_TALK = [{"role": "user", "content": "What is 12 + 30?"}]
_ANSWER = "It is 42."


def save_family(family: str, directory: Path, *, reward: bool = False) -> Path:
    """A random model in fp32 with a byte-level tokenizer.

    Raises ValueError where transformers has no such class.
    """
    size = save_tokenizer(directory) + 5
    labels = {"num_labels": 1} if reward else {}
    config = AutoConfig.for_model(
        family, vocab_size=size, bos_token_id=0, eos_token_id=2, **FAMILIES[family], **labels
    )
    config.pad_token_id = None
    torch.manual_seed(0)
    model = (AutoModelForSequenceClassification if reward else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    model.float().save_pretrained(directory)
    return directory


def captures(directory: Path) -> None:
    """Log-probabilities of a response's tokens are those of transformers' own forward pass."""
    options = SourceOptions(model=str(directory), dtype="fp32")
    chat = load_format(options, "sources.a")
    encoded = chat.encode_conversation(_TALK, _ANSWER)
    recipe = make_recipe(
        {
            "workdir": "none",
            "target": {"model": str(directory)},
            "sources": {"a": {"model": str(directory), "dtype": "fp32"}},
            "data": {"path": "none.jsonl"},
            "schedule": {"preset": "fuse"},
            "training": {"seq_length": 96},
        }
    )
    reader = SourceReader(recipe, "a", load_causal_lm(options, where="sources.a"))
    shard = reader.capture_shard(
        [Conversation("x", encoded), Conversation("y", chat.encode_conversation(_TALK, "No."))]
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(encoded.ids[None].astype(np.int64))).logits[0].double()
    rows = np.flatnonzero(encoded.supervised) - 1
    expected = torch.log_softmax(logits, 1)[rows, encoded.ids[encoded.supervised].astype(np.int64)].numpy()
    np.testing.assert_allclose(shard.token_logprobs[shard.rows(0)], expected, atol=5e-4)


def answers(directory: Path) -> None:
    """Greedy answers in a batch with a cache are those of one forward pass over the whole text per token."""
    options = SourceOptions(model=str(directory), dtype="fp32")
    chat, model = load_format(options, "sources.a"), load_causal_lm(options, where="sources.a")
    allowed = torch.from_numpy(chat.tokenizer.byte_lengths > 0)
    allowed[sorted(chat.end_ids)] = True
    prompts = [
        chat.encode_prompt([{"role": "user", "content": text}]) for text in ("What is 12 + 30?", "fig")
    ]
    asked = [Prompt(str(n), ids, 8, n) for n, ids in enumerate(prompts)]
    found = generate(model, asked, Sampling(chat.end_ids, allowed, temperature=0.0), batch_tokens=200)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for ids, answer in zip(prompts, found, strict=True):
        expected: list[int] = []
        while len(expected) < 8:
            with torch.inference_mode():
                logits = plain(torch.tensor([[*ids, *expected]])).logits[0, -1, : len(allowed)]
            token = int(logits.masked_fill(~allowed, -torch.inf).argmax())
            if token in chat.end_ids:
                break
            expected.append(token)
        assert answer.ids == expected


def round_trip(directory: Path, output: Path) -> str | None:
    """On a rank: the model as a Megatron model, written back.

    Returns the refusal where it cannot be a target.
    """
    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.model.conversion import load_hugging_face_weights, save_hugging_face_model
    from megatron_fuse.model.gpt import build_model
    from megatron_fuse.runtime import start_runtime

    start_runtime()
    try:
        architecture = read_architecture(directory)
        model = build_model(architecture, transformer_config(architecture), seq_length=64)
        load_hugging_face_weights([model], directory)
        save_hugging_face_model(model, directory, output, "fp32", 10**9)
    except UserError as error:
        return str(error)
    return None


def is_target(directory: Path, ranks: Callable, output: Path, original: Path | None = None) -> None:
    """Every bit of the weights comes back. original: a directory with one weight file that holds the same
    weights.
    """
    [refusal] = ranks(1, round_trip, directory, output)
    if refusal is not None:
        raise UserError(refusal)
    before, after = (load_file(path / "model.safetensors") for path in (original or directory, output))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def rewards(directory: Path) -> None:
    """A batch's rewards are those of transformers' classifier, one conversation at a time."""
    reward_model = load_reward_model(RewardModelOptions(model=str(directory), dtype="fp32"), "reward")
    # Not AutoTokenizer, which takes another pre-tokenizer than the file's for some families.
    cut = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    replies = [_ANSWER, "No."]
    found = score_conversations(
        reward_model, [[reward_model.encode(_TALK, reply)] for reply in replies], batch_tokens=200
    )
    for reply, reward in zip(replies, np.concatenate(found), strict=True):
        talk = [*_TALK, {"role": "assistant", "content": reply}]
        text = render_jinja_template([talk], chat_template=template)[0][0].removesuffix("\n")
        with torch.inference_mode():
            expected = model(torch.tensor([cut.encode(text, add_special_tokens=False).ids])).logits.item()
        assert abs(reward - expected) < 1e-3 * max(1.0, abs(expected)), (reward, expected)


def cell(check: Callable, *arguments: object) -> str:
    """`yes`, or what a refusal says first, without the directory, the first argument."""
    try:
        check(*arguments)
    except UserError as error:
        said = str(error).replace(f"{arguments[0]}/", "").replace(str(arguments[0]), "the model")
        first = re.split(r"[;(]|\.(?= [A-Z])|: (?=fetch|pip |python )", said)[0]
        return f"no: {first.strip()}"
    return "yes"
