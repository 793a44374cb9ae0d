"""Sources in Megatron: at every layout their captures are those of the model in process, up to rounding."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_captures import TEXTS
from small_models import save_model, write_rows
from small_tokenizers import byte_level, llama_json, sentencepiece_model
from target_families import FAMILIES, MIXTURES
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_fuse.capture import CAPTURES, STATUSES, CaptureShard, capture, capture_shard, require_backend
from megatron_fuse.capture.megatron_layout import source_architecture
from megatron_fuse.claiming import LEASE
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.responses import generate_responses
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


def read(recipe: Recipe, source: str, mode: str) -> list[CaptureShard]:
    artifact = Context(recipe).open(CAPTURES, source, mode)
    return [capture_shard(artifact, index) for index in range(artifact.manifest["shards"])]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe, whose captures in process are done."""
    root = tmp_path_factory.mktemp("megatron")
    write_data(root)
    content = recipe_content(root, save_sources(root))
    recipe = make_recipe(content)
    prepare_instructions(Context(recipe))
    generate_responses(Context(recipe), "wide")
    run_captures(content)
    return content


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
    ranks, expected, tmp_path, name
) -> None:
    size, parallel = LAYOUTS[name]
    content = in_megatron(expected, tmp_path, **parallel)
    ranks(size, run_captures, content)
    seen, lossy = set(), 0
    for source, mode in jobs(content):
        pairs = zip(
            read(make_recipe(content), source, mode), read(make_recipe(expected), source, mode), strict=True
        )
        for found, shard in pairs:
            assert_same_up_to_rounding(found, shard)
            seen |= {STATUSES[code] for code in found.status}
            lossy += int(found.lossy.sum())
            assert max(found.counts, default=0) == 120  # more than a rank's columns of `lossy`, 64
    assert seen == {"captured", "no_response", "too_long"} and lossy > 0


def test_an_example_reaches_the_limit(expected: dict[str, Any]) -> None:
    """What the tests above compare holds a conversation that was cut to the limit."""
    lines = Path(expected["workdir"]).glob("instructions/examples.*.jsonl")
    examples = [json.loads(line) for path in lines for line in path.read_text().splitlines()]
    assert any(example["truncated"] for example in examples)


def test_bf16_follows_the_model_in_process(ranks, expected, tmp_path) -> None:  # type: ignore[no-untyped-def]
    bf16 = {
        **expected,
        "sources": {"wide": {**expected["sources"]["wide"], "dtype": "bf16"}},
        "workdir": str(tmp_path / "in-process" / "run"),
    }
    for name in ("instructions", "responses"):
        shutil.copytree(Path(expected["workdir"]) / name, Path(bf16["workdir"]) / name)
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
def test_the_vocabularies_of_llama_3_and_qwen(ranks, expected, tmp_path, vocab) -> None:  # type: ignore[no-untyped-def]
    """A narrow model, with a real number of columns."""
    model = Path(shutil.copytree(expected["sources"]["wide"]["model"], tmp_path / "model"))
    torch.manual_seed(vocab)
    save_random(model, LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocab)))
    source = {**expected["sources"]["wide"], "model": str(model)}
    content = in_megatron({**expected, "sources": {"wide": source}}, tmp_path, **layout(tp=2))
    # As in process, but in a workdir of its own.
    plain = {**content, "workdir": str(tmp_path / "in-process"), "sources": {"wide": source}}
    shutil.copytree(content["workdir"], plain["workdir"])
    for each in (content, plain):
        each["capture"] = {**expected["capture"], "top_k": 10}
    capture(Context(make_recipe(plain)), "wide", "training")
    ranks(2, run_captures, content)
    pairs = zip(*(read(make_recipe(each), "wide", "training") for each in (content, plain)), strict=True)
    for found, shard in pairs:
        assert found.vocab_size == vocab
        assert_same_up_to_rounding(found, shard)


def test_logits_with_a_soft_cap(ranks, expected, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A Gemma 2, which also caps the scores of its attention."""
    model = Path(shutil.copytree(expected["sources"]["tied"]["model"], tmp_path / "model"))
    caps = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
    shape = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    torch.manual_seed(5)
    save_random(model, Gemma2ForCausalLM(Gemma2Config(**SIZES, **shape, **caps, vocab_size=vocab)))
    source = {"model": str(model), "dtype": "fp32"}
    content = in_megatron({**expected, "sources": {"wide": source}}, tmp_path, **layout(tp=2))
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
    ranks, expected, tmp_path, family, processes, parallel
) -> None:
    """Batches have odd lengths, which the tensor ranks of a mixture share."""
    model = Path(shutil.copytree(expected["sources"]["tied"]["model"], tmp_path / "model"))
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    config_class, further = (FAMILIES | MIXTURES)[family]
    if family == "phi3":  # longrope has the short frequencies for the longest text too
        further = further | {"original_max_position_embeddings": SIZES["max_position_embeddings"]}
    torch.manual_seed(5)
    # Four layers, for the families with kinds of layers.
    config = config_class(**SIZES | {"num_hidden_layers": 4}, **further, vocab_size=vocab_size)
    save_random(model, AutoModelForCausalLM.from_config(config))
    source = {"model": str(model), "dtype": "fp32"}
    content = in_megatron({**expected, "sources": {family: source}}, tmp_path, **parallel)
    plain = {**content, "workdir": str(tmp_path / "in-process"), "sources": {family: source}}
    shutil.copytree(content["workdir"], plain["workdir"])
    capture(Context(make_recipe(plain)), family, "training")
    ranks(processes, run_training_captures, content)
    pairs = zip(*(read(make_recipe(each), family, "training") for each in (content, plain)), strict=True)
    for found, shard in pairs:
        assert_same_up_to_rounding(found, shard)


def test_a_capture_continues_at_another_layout(ranks, expected, tmp_path) -> None:  # type: ignore[no-untyped-def]
    content = in_megatron(
        {**expected, "sources": {"wide": expected["sources"]["wide"]}}, tmp_path, **layout()
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
        *(read(make_recipe(each), "wide", "training") for each in (content, expected)), strict=True
    ):
        assert_same_up_to_rounding(found, shard)


@pytest.mark.parametrize("parallel", [layout(tp=2), layout()], ids=["tp2-dp2", "dp4"])
def test_copies_take_their_shards_by_claim(ranks, expected, tmp_path, parallel) -> None:  # type: ignore[no-untyped-def]
    """The leader of a copy claims; the artifact is as without claims."""
    sources = {"wide": expected["sources"]["wide"]}
    content = in_megatron({**expected, "sources": sources}, tmp_path, **parallel)
    ranks(4, run_claimed_captures, content)
    pairs = zip(*(read(make_recipe(each), "wide", "training") for each in (content, expected)), strict=True)
    for found, shard in pairs:
        assert_same_up_to_rounding(found, shard)
    directory = Path(content["workdir"]) / "captures/wide/training"
    others = {path.name for path in directory.iterdir()}
    assert others == {path.name for path in (Path(expected["workdir"]) / "captures/wide/training").iterdir()}


def error_of(content: dict[str, Any]) -> str:
    try:
        run_captures(content)
    except UserError as error:
        return str(error)
    return "no error"


def damaged(directory: Path, tensor: str, value: float) -> Path:
    """The model with one element of a tensor replaced."""
    tensors = load_file(directory / "model.safetensors")
    tensors[tensor].view(-1)[0] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def with_model(expected: dict[str, Any], tmp_path: Path, directory: Path, **parallel: int) -> dict[str, Any]:
    """The recipe with `wide` alone, of another directory, in Megatron."""
    source = {**expected["sources"]["wide"], "model": str(directory)}
    return in_megatron({**expected, "sources": {"wide": source}}, tmp_path, **parallel)


def test_logits_that_are_not_finite_name_the_example(ranks, expected, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = Path(shutil.copytree(expected["sources"]["wide"]["model"], tmp_path / "model"))
    # Finite weights, whose products are not.
    damaged(model, "model.norm.weight", 3e38)
    damaged(model, "lm_head.weight", 3e38)
    [message] = ranks(1, error_of, with_model(expected, tmp_path, model, **layout()))
    assert "sources.wide: the logits are NaN or infinite in example 'e" in message


def test_a_model_that_megatron_cannot_read_names_the_fix(expected: dict[str, Any], tmp_path: Path) -> None:
    model = save_model(tmp_path / "mpt", "mpt")
    message = error_of(with_model(expected, tmp_path, model))
    assert "sources.wide.backend is megatron, but Megatron cannot read this model" in message
    assert "MptForCausalLM is not supported" in message and "the backend hf reads" in message


def test_a_source_with_longrope_reads_no_longer_texts_than_its_frequencies_are_for(
    expected: dict[str, Any], tmp_path: Path
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "long")
    content = in_megatron(expected, tmp_path)
    content["sources"]["wide"]["model"] = str(tmp_path / "long")
    with pytest.raises(
        UserError, match=r"training\.seq_length of at most 64, or remove sources\.wide\.backend"
    ):
        source_architecture(make_recipe(content), "wide")


@pytest.mark.parametrize("parallel", [layout(tp=2), layout(pp=2)])
def test_too_few_processes_are_refused(
    expected: dict[str, Any], tmp_path: Path, parallel: dict[str, int]
) -> None:
    message = error_of(in_megatron(expected, tmp_path, **parallel))
    assert "pipeline_model_parallel_size is 2, but the number of processes is 1" in message


def test_a_layout_that_does_not_fit_the_model_is_refused(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any rank waits for another."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = error_of(in_megatron(expected, tmp_path, **layout(tp=3)))
    assert "sources.wide.parallel: --tensor-model-parallel-size 3 does not divide" in message


def test_a_layout_needs_the_backend(expected: dict[str, Any]) -> None:
    source = {**expected["sources"]["wide"], "parallel": layout(tp=2)}
    with pytest.raises(UserError, match="parallel divides a source of backend megatron, but backend is hf"):
        make_recipe({**expected, "sources": {"wide": source}})


def test_the_command_line_cannot_choose_another_backend(expected: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(in_megatron(expected, tmp_path, **layout()))
    require_backend(recipe, "wide", "training", "megatron")
    with pytest.raises(UserError, match=r"--backend hf: sources\.wide\.backend is megatron\. Change it"):
        require_backend(recipe, "wide", "training", "hf")


def test_the_error_of_one_rank_ends_all(expected: dict[str, Any], tmp_path: Path) -> None:
    """A weight that only the second of two stages reads is damaged: the first stage meets no error."""
    model = Path(shutil.copytree(expected["sources"]["wide"]["model"], tmp_path / "model"))
    damaged(model, "model.layers.3.mlp.down_proj.weight", float("nan"))
    content = with_model(expected, tmp_path, model, **layout(pp=2))
    path = tmp_path / "recipe.json"  # JSON is YAML
    path.write_text(json.dumps(content))
    command = ["-m", "megatron_fuse.torchrun", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megatron_fuse.cli", "capture", "--recipe", str(path), "--mode", "training"]
    ended = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode != 0
    assert "model.layers.3.mlp.down_proj.weight" in ended.stdout, ended.stdout[-4000:]
