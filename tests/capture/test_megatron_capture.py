"""Sources in Megatron: at every layout their captures are those of the model in process, up to rounding."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_captures import (
    SIZES,
    assert_same_up_to_rounding,
    in_megatron,
    jobs,
    layout,
    run_captures,
    run_claimed_captures,
    run_training_captures,
    save_random,
)
from small_captures import read
from target_families import FAMILIES, MIXTURES
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from megatron_fuse.capture import STATUSES, capture
from megatron_fuse.recipe import make_recipe
from megatron_fuse.stages import Context

LAYOUTS = {
    "tp4": (4, layout(tp=4)),
    "tp2-pp2": (4, layout(tp=2, pp=2)),
    "pp4": (4, layout(pp=4)),
    "tp2-dp2": (4, layout(tp=2)),
    "pp2-dp2": (4, layout(pp=2)),
    "dp4": (4, layout()),
}


# The slow ones have splits that others below have with another; pp4 alone has stages between first and last.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("tp4", "tp2-dp2", "dp4") else ())
        for name in LAYOUTS
    ],
)
def test_a_layout_captures_what_the_model_in_process_does(  # type: ignore[no-untyped-def]
    ranks, in_process, tmp_path, name
) -> None:
    size, parallel = LAYOUTS[name]
    content = in_megatron(in_process, tmp_path, **parallel)
    ranks(size, run_captures, content)
    seen, lossy = set(), 0
    for source, mode in jobs(content):
        pairs = zip(
            read(make_recipe(content), source, mode), read(make_recipe(in_process), source, mode), strict=True
        )
        for found, shard in pairs:
            assert_same_up_to_rounding(found, shard)
            seen |= {STATUSES[code] for code in found.status}
            lossy += int(found.lossy.sum())
            assert max(found.counts, default=0) == 120  # more than a rank's columns of `lossy`, 64
    assert seen == {"captured", "no_response", "too_long"} and lossy > 0


def test_an_example_reaches_the_limit(in_process: dict[str, Any]) -> None:
    """What the tests above compare holds a conversation that was cut to the limit."""
    lines = Path(in_process["workdir"]).glob("instructions/examples.*.jsonl")
    examples = [json.loads(line) for path in lines for line in path.read_text().splitlines()]
    assert any(example["truncated"] for example in examples)


def test_bf16_follows_the_model_in_process(ranks, in_process, tmp_path) -> None:  # type: ignore[no-untyped-def]
    bf16 = {
        **in_process,
        "sources": {"wide": {**in_process["sources"]["wide"], "dtype": "bf16"}},
        "workdir": str(tmp_path / "in-process" / "run"),
    }
    for name in ("instructions", "responses"):
        shutil.copytree(Path(in_process["workdir"]) / name, Path(bf16["workdir"]) / name)
    capture(Context(make_recipe(bf16)), "wide", "training")
    content = in_megatron(bf16, tmp_path, **layout(tp=2))
    ranks(2, run_captures, content)
    for found, shard in zip(
        *(read(make_recipe(each), "wide", "training") for each in (content, bf16)), strict=True
    ):
        # Logits lie below 16, where neighbouring numbers of bf16 are 2**-4 apart. Hidden states differ by
        # rounding before that.
        difference = np.abs(found.token_logprobs - shard.token_logprobs)
        assert difference.mean() < 2**-4 and difference.max() < 0.5


@pytest.mark.parametrize("vocab", [128256, 152064])
def test_the_vocabularies_of_llama_3_and_qwen(ranks, in_process, tmp_path, vocab) -> None:  # type: ignore[no-untyped-def]
    """A narrow model, with a real number of columns."""
    model = Path(shutil.copytree(in_process["sources"]["wide"]["model"], tmp_path / "model"))
    torch.manual_seed(vocab)
    save_random(model, LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocab)))
    source = {**in_process["sources"]["wide"], "model": str(model)}
    content = in_megatron({**in_process, "sources": {"wide": source}}, tmp_path, **layout(tp=2))
    # As in process, but in a workdir of its own.
    plain = {**content, "workdir": str(tmp_path / "in-process"), "sources": {"wide": source}}
    shutil.copytree(content["workdir"], plain["workdir"])
    for each in (content, plain):
        each["capture"] = {**in_process["capture"], "top_k": 10}
    capture(Context(make_recipe(plain)), "wide", "training")
    ranks(2, run_captures, content)
    pairs = zip(*(read(make_recipe(each), "wide", "training") for each in (content, plain)), strict=True)
    for found, shard in pairs:
        assert found.vocab_size == vocab
        assert_same_up_to_rounding(found, shard)


def test_logits_with_a_soft_cap(ranks, in_process, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A Gemma 2, which also caps the scores of its attention."""
    model = Path(shutil.copytree(in_process["sources"]["tied"]["model"], tmp_path / "model"))
    caps = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
    shape = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    torch.manual_seed(5)
    save_random(model, Gemma2ForCausalLM(Gemma2Config(**SIZES, **shape, **caps, vocab_size=vocab)))
    source = {"model": str(model), "dtype": "fp32"}
    content = in_megatron({**in_process, "sources": {"wide": source}}, tmp_path, **layout(tp=2))
    plain = {**content, "workdir": str(tmp_path / "in-process"), "sources": {"wide": source}}
    shutil.copytree(content["workdir"], plain["workdir"])
    capture(Context(make_recipe(plain)), "wide", "training")
    ranks(2, run_training_captures, content)
    pairs = zip(*(read(make_recipe(each), "wide", "training") for each in (content, plain)), strict=True)
    for found, shard in pairs:
        assert_same_up_to_rounding(found, shard)
        assert shard.entry_logits.min() > -6  # capped logits lie between -3 and 3


_FOLDED = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}


def families_at_layouts() -> Iterator[Any]:
    """Every family at TP=2. Mixtures also with the experts over the tensor ranks, and with a pipeline."""
    for family in FAMILIES | MIXTURES:
        plain = family in ("qwen3", "gemma3")
        yield pytest.param(family, 2, layout(tp=2), marks=[] if plain else pytest.mark.slow, id=family)
    for family in MIXTURES:
        plain = family == "qwen3_moe"
        mark = [] if plain else pytest.mark.slow
        yield pytest.param(family, 2, _FOLDED, marks=mark, id=f"{family}-tp2-ep2")
        piped = _FOLDED | {"pipeline_model_parallel_size": 2}
        yield pytest.param(family, 4, piped, marks=mark, id=f"{family}-tp2-pp2-ep2")


@pytest.mark.parametrize(("family", "processes", "parallel"), families_at_layouts())
def test_every_family_captures_what_its_model_in_process_does(  # type: ignore[no-untyped-def]
    ranks, in_process, tmp_path, family, processes, parallel
) -> None:
    """Batches have odd lengths, which the tensor ranks of a mixture share."""
    model = Path(shutil.copytree(in_process["sources"]["tied"]["model"], tmp_path / "model"))
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    config_class, further = (FAMILIES | MIXTURES)[family]
    if family == "phi3":  # longrope has the short frequencies for the longest text too
        further = further | {"original_max_position_embeddings": SIZES["max_position_embeddings"]}
    torch.manual_seed(5)
    # Four layers, for the families with kinds of layers.
    config = config_class(**SIZES | {"num_hidden_layers": 4}, **further, vocab_size=vocab_size)
    save_random(model, AutoModelForCausalLM.from_config(config))
    source = {"model": str(model), "dtype": "fp32"}
    content = in_megatron({**in_process, "sources": {family: source}}, tmp_path, **parallel)
    plain = {**content, "workdir": str(tmp_path / "in-process"), "sources": {family: source}}
    shutil.copytree(content["workdir"], plain["workdir"])
    capture(Context(make_recipe(plain)), family, "training")
    ranks(processes, run_training_captures, content)
    pairs = zip(*(read(make_recipe(each), family, "training") for each in (content, plain)), strict=True)
    for found, shard in pairs:
        assert_same_up_to_rounding(found, shard)


def test_a_capture_continues_at_another_layout(ranks, in_process, tmp_path) -> None:  # type: ignore[no-untyped-def]
    content = in_megatron(
        {**in_process, "sources": {"wide": in_process["sources"]["wide"]}}, tmp_path, **layout()
    )
    ranks(1, run_captures, content)
    directory = Path(content["workdir"]) / "captures/wide/training"
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    for name in ("manifest.json", "shard-00001.done", "shard-00001.safetensors"):
        (directory / name).unlink()
    other = {**content["sources"]["wide"], "parallel": layout(tp=2)}
    ranks(2, run_captures, {**content, "sources": {"wide": other}})
    for name in ("plan.json", "shard-00000.safetensors", "shard-00002.safetensors"):
        assert (directory / name).read_bytes() == whole[name]
    for found, shard in zip(
        *(read(make_recipe(each), "wide", "training") for each in (content, in_process)), strict=True
    ):
        assert_same_up_to_rounding(found, shard)


@pytest.mark.parametrize("parallel", [layout(tp=2), layout()], ids=["tp2-dp2", "dp4"])
def test_copies_take_their_shards_by_claim(ranks, in_process, tmp_path, parallel) -> None:  # type: ignore[no-untyped-def]
    """The leader of a copy claims; the artifact is as without claims."""
    sources = {"wide": in_process["sources"]["wide"]}
    content = in_megatron({**in_process, "sources": sources}, tmp_path, **parallel)
    ranks(4, run_claimed_captures, content)
    pairs = zip(*(read(make_recipe(each), "wide", "training") for each in (content, in_process)), strict=True)
    for found, shard in pairs:
        assert_same_up_to_rounding(found, shard)
    directory = Path(content["workdir"]) / "captures/wide/training"
    others = {path.name for path in directory.iterdir()}
    assert others == {
        path.name for path in (Path(in_process["workdir"]) / "captures/wide/training").iterdir()
    }
