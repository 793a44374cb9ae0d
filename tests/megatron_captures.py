"""Captures in Megatron and in process of the same small sources, and what their difference may be."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_captures import TEXTS
from small_models import write_rows
from small_tokenizers import byte_level, llama_json, sentencepiece_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_fuse.capture import CaptureShard, capture
from megatron_fuse.claiming import LEASE
from megatron_fuse.recipe import make_recipe
from megatron_fuse.stages import Context

# Four layers, heads and key/value heads: one for each of four ranks.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
LIMIT = 255
ROUNDING = 1e-4


def save_random(directory: Path, model: PreTrainedModel) -> None:
    """Every parameter is random, and wide enough that what a token attends to decides what comes next."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.25)
    model.save_pretrained(directory)


def save_sources(root: Path) -> dict[str, Any]:
    """Four sources whose vocabularies are no multiple of anything.

    wide: a Llama. tied: a Qwen2 whose head is its embedding. capped: a Gemma 2. lossy: a Llama whose
    tokenizer cannot spell every text; at TP=4 one of its ranks has padding alone.
    """
    torch.manual_seed(3)
    wide, tied = llama_json(), byte_level()
    save_random(root / "wide", LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(wide) | 1)))
    config = Qwen2Config(**SIZES, vocab_size=len(tied) + 4 | 1, tie_word_embeddings=True)
    save_random(root / "tied", Qwen2ForCausalLM(config))
    save_random(root / "lossy", LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=131)))
    capped = Gemma2Config(
        **SIZES,
        vocab_size=len(tied) + 2 | 1,
        head_dim=8,
        sliding_window=16,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    )
    save_random(root / "capped", Gemma2ForCausalLM(capped))
    wide.save_pretrained(root / "wide")
    tied.save_pretrained(root / "tied")
    tied.save_pretrained(root / "capped")
    (root / "lossy" / "tokenizer.model").write_bytes(sentencepiece_model("bpe", byte_fallback=False))
    vicuna = {"chat_template": "vicuna_v1.1"}
    return {
        "wide": {"model": str(root / "wide"), "responses": str(root / "answers.jsonl"), **vicuna},
        "tied": {"model": str(root / "tied")},
        "capped": {"model": str(root / "capped")},
        "lossy": {"model": str(root / "lossy"), **vicuna},
    }


def write_data(root: Path) -> None:
    """Conversations of one and two turns, some of them longer than the limit; answers, some of them empty."""
    texts = [*TEXTS, " ".join(TEXTS[:2]) * 6]
    rows, answers = [], []
    for n in range(13):
        earlier = [("user", f"First {n}?"), ("assistant", texts[(n + 2) % 7])] if n % 3 == 0 else []
        turns = [*earlier, ("user", f"Question {n}?"), ("assistant", texts[n % 7])]
        rows.append({"id": f"e{n}", "messages": [{"role": role, "content": text} for role, text in turns]})
        answers.append({"id": f"e{n}", "response": "" if n == 4 else texts[(n + 1) % 7], "truncated": n == 5})
    write_rows(root / "data.jsonl", rows)
    write_rows(root / "answers.jsonl", answers)


def recipe_content(root: Path, sources: dict[str, Any], dtype: str = "fp32") -> dict[str, Any]:
    return {
        "workdir": str(root / "run"),
        "target": {"model": str(root / "wide"), "chat_template": "vicuna_v1.1"},
        "sources": {name: {"dtype": dtype, **options} for name, options in sources.items()},
        "data": {"path": str(root / "data.jsonl"), "shard_size": 5, "supervise": "every_turn"},
        # More entries than a rank has columns; all of them stored; the filter's order does not matter then.
        "capture": {"top_k": 120, "top_p": 1.0, "temperatures": [2.0, 0.7], "batch_tokens": 600},
        "schedule": {"preset": "fuse"},
        "training": {"seq_length": LIMIT},
    }


def jobs(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The captures that are compared: every source over the ground truth, one over its own answers."""
    return [*((source, "training") for source in content["sources"]), ("wide", "inference")]


def run_training_captures(content: dict[str, Any]) -> None:
    recipe = make_recipe(content)
    for source in recipe.sources:
        capture(Context(recipe), source, "training")


def run_captures(content: dict[str, Any]) -> None:
    recipe = make_recipe(content)
    for source, mode in jobs(content):
        capture(Context(recipe), source, mode)


def run_claimed_captures(content: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LEASE, "60")
        run_training_captures(content)


def in_megatron(content: dict[str, Any], directory: Path, **parallel: int) -> dict[str, Any]:
    """The recipe in a workdir of its own, with every source in Megatron."""
    for name in ("instructions", "responses"):
        shutil.copytree(Path(content["workdir"]) / name, directory / "run" / name)
    divided = {"backend": "megatron", "parallel": parallel}
    sources = {name: {**options, **divided} for name, options in content["sources"].items()}
    return {**content, "workdir": str(directory / "run"), "sources": sources}


def layout(tp: int = 1, pp: int = 1) -> dict[str, int]:
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}


def assert_same_up_to_rounding(found: CaptureShard, shard: CaptureShard) -> None:
    for name in ("offsets", "status", "response_bytes", "lossy", "tokens", "starts", "ends", "flags"):
        np.testing.assert_array_equal(getattr(found, name), getattr(shard, name), err_msg=name)
    np.testing.assert_array_equal(found.counts, shard.counts)
    np.testing.assert_array_equal(found.vocab_size, shard.vocab_size)
    for name in ("token_logprobs", "lse", "entry_logits"):
        np.testing.assert_allclose(getattr(found, name), getattr(shard, name), atol=ROUNDING, err_msg=name)
    np.testing.assert_allclose(found.ce_sum, shard.ce_sum, rtol=1e-5)
    np.testing.assert_allclose(found.ce_stop, shard.ce_stop, atol=ROUNDING)
    ends = np.cumsum(shard.counts, dtype=np.int64)
    for first, last in zip(ends - shard.counts, ends, strict=True):
        ours, theirs = (
            dict(
                zip(each.entry_ids[first:last].tolist(), each.entry_logits[first:last].tolist(), strict=True)
            )
            for each in (found, shard)
        )
        # Entries change places only if their logits are equal up to rounding. At the end of a row one may
        # then be stored in place of another.
        least = theirs[next(reversed(theirs))]
        for token in ours.keys() | theirs.keys():
            assert abs(ours.get(token, least) - theirs.get(token, least)) < ROUNDING, (first, token)
