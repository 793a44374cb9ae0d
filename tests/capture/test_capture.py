"""Laws of capture: a source's rows are those of reading one example at a time, whatever the batch, for the
token that comes next.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from log_lines import at_every_shard
from small_captures import Models, changed, fresh_recipe, read, world_recipe
from small_models import small_recipe, write_rows
from small_tokenizers import sentencepiece_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from megatron_fuse.capture import (
    CAPTURED,
    CAPTURES,
    STATUSES,
    capture,
)
from megatron_fuse.capture.reading import logits_at
from megatron_fuse.capture.shards import NO_RESPONSE, TOO_LONG
from megatron_fuse.chat import supervised_turns
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.instructions import INSTRUCTIONS, example_shards, load_examples, prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import source_options
from megatron_fuse.responses import RESPONSES, generate_responses, response_shards
from megatron_fuse.sources.batching import token_budget_batches
from megatron_fuse.stages import Context
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans, response_bytes


def test_batches_are_a_partition_within_the_budget() -> None:
    seed = 5
    lengths = np.random.default_rng(seed).integers(1, 300, 100).tolist()
    for budget in (1, 250, 1000, 100_000):
        batches = token_budget_batches(lengths, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(100)), f"seed {seed}"
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches), (
            f"seed {seed}"
        )
    assert len(token_budget_batches(lengths, 100_000)) == 1
    assert token_budget_batches([], 10) == []


def test_logits_at_is_the_model_itself() -> None:
    """Gemma caps its logits after the head; GPT-2 has its head tied; Mamba attends to nothing; the last
    names no head.
    """
    torch.manual_seed(0)
    small = {"vocab_size": 61, "max_position_embeddings": 32}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    cap = {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 0.05}
    gpt2 = GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    mamba = MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1)
    headless = GPT2LMHeadModel(gpt2)
    headless.get_output_embeddings = lambda: None
    tokens = torch.randint(0, 61, (3, 7))
    positions = torch.tensor([0, 6, 8, 9, 20])
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, **sizes, **cap))
    for model in (gemma, GPT2LMHeadModel(gpt2), MambaForCausalLM(mamba), headless):
        with torch.inference_mode():
            expected = model.eval()(tokens).logits.flatten(0, 1)[positions]
            found = logits_at(model, tokens, torch.ones_like(tokens), positions)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert found.shape == (5, 61), type(model)


# 1: every example alone; 150: two or three together; 10**6: whole shards
@pytest.mark.parametrize(("source", "batch_tokens"), [("alpha", 1), ("beta", 150), ("gamma", 10**6)])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_capture_equals_reading_one_example_at_a_time(
    fresh: Recipe, source: str, batch_tokens: int, mode: str
) -> None:
    recipe = changed(fresh, capture={"batch_tokens": batch_tokens})
    capture(Context(recipe), source, mode)
    shards = read(recipe, source, mode)
    options = source_options(recipe, source)
    model, chat = load_causal_lm(options), load_format(options, source)
    examples = load_examples(Context(recipe).open(INSTRUCTIONS))
    answers = [
        answer for shard in response_shards(Context(recipe).open(RESPONSES, source)) for answer in shard
    ]
    place = [(shard, index) for shard in shards for index in range(len(shard.status))]
    seen = set()
    for example, answer, (shard, index) in zip(examples, answers, place, strict=True):
        given = answer if mode == "inference" else example
        text, truncated = given.response, given.truncated
        every_turn = mode == "training"
        turns = supervised_turns(example.messages, text, every_turn=every_turn)
        seen.add((STATUSES[shard.status[index]], truncated, len(turns)))
        span = shard.rows(index)
        if not text.strip():
            assert shard.status[index] == NO_RESPONSE
            assert span.start == span.stop
            assert np.isnan(shard.ce_sum[index]) and np.isnan(shard.ce_stop[index])
            continue
        encoded = chat.encode_conversation(
            example.prompt(chat.system), text, stop=not truncated, every_turn=every_turn
        )
        with torch.inference_mode():
            logits = model(torch.from_numpy(encoded.ids[None].astype(np.int64))).logits[0].double()
        dense = torch.log_softmax(logits, 1)
        labels = encoded.ids[encoded.supervised]
        # The distribution after the last prompt token predicts the first response token, and so on.
        rows = np.flatnonzero(encoded.supervised) - 1
        expected = dense[rows, labels].numpy()
        assert shard.tokens[span].tolist() == labels.tolist()
        # Fp32 attention in other shapes.
        np.testing.assert_allclose(shard.token_logprobs[span], expected, atol=2e-4)
        stop = encoded.spans.has(SpanFlag.STOP)
        assert stop.sum() == len(turns) - truncated
        np.testing.assert_allclose(shard.ce_sum[index], -expected[~stop].sum(), rtol=1e-5)
        stops = -expected[stop].sum() if stop.any() else np.nan
        np.testing.assert_allclose(shard.ce_stop[index], stops, atol=4e-4)
        assert shard.response_tokens[index] == (~stop).sum()
        assert shard.response_bytes[index] == len(response_bytes(turns)) - len(turns)
        assert shard.lossy[index] == 0
        entries = np.concatenate([[0], np.cumsum(shard.counts, dtype=np.int64)])[span.start : span.stop + 1]
        tempered = torch.log_softmax(logits / 2.0, 1)
        for row, first, last in zip(rows, entries[:-1], entries[1:], strict=True):
            ids = shard.entry_ids[first:last].tolist()
            assert ids == dense[row].topk(last - first).indices.tolist()
            np.testing.assert_allclose(shard.logprobs(1, 2.0)[first:last], tempered[row, ids], atol=2e-4)
    wanted = {("captured", False, 1)}
    wanted |= (
        {("captured", False, 2)} if mode == "training" else {("captured", True, 1), ("no_response", False, 1)}
    )
    assert wanted <= seen, (
        "the data holds no truncated, empty or long conversation: the test tells less than it says"
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_source_runs_in_its_own_precision(fresh: Recipe, dtype: str) -> None:
    options = fresh.sources["beta"].model_copy(update={"dtype": dtype})
    recipe = fresh.model_copy(update={"sources": {"beta": options}})
    capture(Context(recipe), "beta", "training")
    shard, chat = read(recipe, "beta", "training")[0], load_format(options, "beta")
    model = load_causal_lm(options)
    assert model.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    example = load_examples(Context(recipe).open(INSTRUCTIONS))[1]
    encoded = chat.encode_conversation(example.prompt(chat.system), example.response)
    with torch.inference_mode():
        logits = model(torch.from_numpy(encoded.ids[None].astype(np.int64))).logits[0].double()
    rows = np.flatnonzero(encoded.supervised) - 1
    expected = torch.log_softmax(logits, 1)[rows, encoded.ids[encoded.supervised]].numpy()
    # Logits lie below 8, where neighbouring numbers of bf16 are 2**-5 apart.
    tolerance = {"bf16": 2**-3, "fp32": 2e-4}[dtype]
    np.testing.assert_allclose(shard.token_logprobs[shard.rows(1)], expected, atol=tolerance)


@pytest.mark.parametrize("supervise", ["every_turn", "last_turn"])
def test_spans_of_a_shard_are_those_of_its_conversations(
    world: tuple[Path, Models], tmp_path: Path, supervise: str
) -> None:
    root, models = world
    recipe = world_recipe(root, models, data={"shard_size": 5, "supervise": supervise})
    recipe = recipe.model_copy(update={"workdir": tmp_path})
    prepare_instructions(Context(recipe))
    capture(Context(recipe), "alpha", "training")
    chat = load_format(recipe.sources["alpha"], "alpha")
    every_turn = supervise == "every_turn"
    turns_met = set()
    for shard, examples in zip(
        read(recipe, "alpha", "training"), example_shards(Context(recipe).open(INSTRUCTIONS)), strict=True
    ):
        spans = []
        for number, example in enumerate(examples):
            encoded = chat.encode_conversation(
                example.prompt(chat.system),
                example.response,
                stop=not example.truncated,
                every_turn=every_turn,
            )
            spans.append(encoded.spans)
            assert_same_spans(shard.spans(number), encoded.spans)
            turns_met.add(int(encoded.spans.has(SpanFlag.STOP).sum()))
        offsets = np.random.default_rng(1).integers(0, 10**6, len(examples))
        assert_same_spans(shard.all_spans(offsets), TokenSpans.join(spans, offsets))
    assert turns_met == ({1, 2} if every_turn else {1})


def assert_same_spans(found: TokenSpans, expected: TokenSpans) -> None:
    for name in ("tokens", "starts", "ends", "flags"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_response_that_the_tokenizer_cannot_spell_is_read_and_its_rows_are_flagged(tmp_path: Path) -> None:
    """A SentencePiece model without byte fallback: characters that it has not become <unk>."""
    directory = tmp_path / "lossy"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(sentencepiece_model("bpe", byte_fallback=False))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=130, max_position_embeddings=512, **sizes)).save_pretrained(
        directory
    )
    texts = ["the station is 12", "the 日本 station 🙂 is"]
    data = write_rows(
        tmp_path / "data.jsonl", [{"instruction": "station?", "output": text} for text in texts]
    )
    options = {"model": str(directory), "chat_template": "vicuna_v1.1"}
    recipe = small_recipe(tmp_path / "run", data, directory, {"lossy": options}, training={"seq_length": 256})
    recipe = changed(recipe, target={"chat_template": "vicuna_v1.1"})
    prepare_instructions(Context(recipe))
    artifact = capture(Context(recipe), "lossy", "training")
    [shard] = read(recipe, "lossy", "training")
    assert (shard.status == CAPTURED).all()
    lossy = [int(shard.spans(number).has(SpanFlag.LOSSY).sum()) for number in range(2)]
    assert shard.lossy.tolist() == [rows > 0 for rows in lossy]
    assert lossy[1] > 0 and artifact is not None and artifact.counts["lossy_rows"] == sum(lossy)
    assert np.isfinite(shard.ce_sum).all() and len(shard.counts) == len(shard.tokens)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# 13 examples in 3 shards: 3 ranks have one each, 4 leave one without work
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same_bytes(
    fresh: Recipe, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    whole = capture(Context(fresh), "beta", "training")
    assert whole is not None
    expected = content(whole.directory)
    shutil.rmtree(whole.directory)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    artifacts = []
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        artifacts.append(capture(Context(fresh), "beta", "training"))
    assert artifacts[-1] is not None and artifacts[0] is None
    assert content(whole.directory) == expected


def test_the_batch_budget_changes_rounding_alone(fresh: Recipe) -> None:
    shards = {}
    for budget in (1, 170, 10**6):
        recipe = changed(fresh, capture={"batch_tokens": budget, "top_p": 1.0})
        recipe = recipe.model_copy(update={"workdir": fresh.workdir.with_name(f"run{budget}")})
        shutil.copytree(fresh.workdir / "instructions", recipe.workdir / "instructions")
        capture(Context(recipe), "gamma", "training")
        shards[budget] = read(recipe, "gamma", "training")
    for budget in (1, 170):
        for found, expected in zip(shards[budget], shards[10**6], strict=True):
            for name in (
                "offsets",
                "status",
                "tokens",
                "starts",
                "ends",
                "flags",
                "counts",
                "response_bytes",
            ):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            for name in ("token_logprobs", "lse", "entry_logits", "ce_sum"):  # sums in another order, in fp32
                np.testing.assert_allclose(
                    getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-5
                )
            # Two entries may change places where their logits differ by no more than rounding.
            moved = found.entry_ids != expected.entry_ids
            assert moved.mean() < 0.01


def test_an_interrupted_run_continues_and_gives_the_same_bytes(fresh: Recipe) -> None:
    whole = capture(Context(fresh), "beta", "training")
    assert whole is not None
    expected = content(whole.directory)
    shutil.rmtree(whole.directory)

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), at_every_shard(interrupt):
        capture(Context(fresh), "beta", "training")
    with pytest.raises(UserError, match=r"is incomplete\. Run megatron-fuse capture"):
        Context(fresh).open(CAPTURES, "beta", "training")
    (whole.directory / "shard-00001.safetensors").write_bytes(b"half a file")
    capture(Context(fresh), "beta", "training")
    assert content(whole.directory) == expected


def test_conversations_that_do_not_fit_are_left_out_and_counted(fresh: Recipe, tmp_path: Path) -> None:
    """A source that joins after the instructions were cut to fit the others."""
    model_dir = Path(fresh.sources["alpha"].model)
    short = tmp_path / "short"
    shutil.copytree(model_dir, short)
    config = (short / "config.json").read_text()
    assert '"max_position_embeddings": 256' in config
    (short / "config.json").write_text(
        config.replace('"max_position_embeddings": 256', '"max_position_embeddings": 150')
    )
    late = fresh.sources["alpha"].model_copy(update={"model": str(short)})
    recipe = fresh.model_copy(update={"sources": {**fresh.sources, "late": late}})
    artifact = capture(Context(recipe), "late", "training")
    assert artifact is not None
    chat = load_format(late, "late")
    examples = load_examples(Context(recipe).open(INSTRUCTIONS))
    lengths = [
        len(chat.encode_conversation(e.prompt(chat.system), e.response, stop=not e.truncated).ids)
        for e in examples
    ]
    expected = [length - 1 > 150 for length in lengths]
    status = np.concatenate([shard.status for shard in read(recipe, "late", "training")])
    assert (status == TOO_LONG).tolist() == expected
    assert artifact.counts["too_long"] == sum(expected)
    assert 0 < sum(expected) < len(expected), f"lengths {lengths} do not try both sides"


def test_numbers_that_are_none_are_refused_by_source_example_and_row(
    fresh: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = load_format(fresh.sources["beta"], "beta")
    example = load_examples(Context(fresh).open(INSTRUCTIONS))[1]
    ids = chat.encode_conversation(example.prompt(chat.system), example.response).ids

    def overflow(
        model: object, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        logits = logits_at(model, tokens, mask, positions)
        batch_row = int((tokens[:, : len(ids) - 1] == torch.from_numpy(ids[:-1])).all(1).nonzero()[0])
        own = (positions // tokens.shape[1] == batch_row).nonzero()
        logits[own[3], 7] = torch.nan
        return logits

    monkeypatch.setattr("megatron_fuse.capture.reading.logits_at", overflow)
    with pytest.raises(UserError, match="the logits are NaN or infinite in example 'e1', response row 3\. "):
        capture(Context(fresh), "beta", "training")
    assert not list((fresh.workdir / "captures/beta/training").glob("shard*"))


@pytest.mark.slow
def test_an_answer_of_a_megabyte_is_counted_as_too_long(world: tuple[Path, Models], tmp_path: Path) -> None:
    answers = write_rows(
        tmp_path / "long.jsonl",
        [{"id": "e0", "response": "word " * 200_000}, {"id": "e1", "response": "Yes."}],
    )
    recipe = fresh_recipe(world, tmp_path)
    shutil.rmtree(recipe.workdir / "responses" / "beta")
    sources = recipe.sources | {"beta": recipe.sources["beta"].model_copy(update={"responses": answers})}
    recipe = recipe.model_copy(update={"sources": sources})
    generate_responses(Context(recipe), "beta")
    artifact = capture(Context(recipe), "beta", "inference")
    assert artifact is not None
    counts = {key: artifact.counts[key] for key in ("examples", "captured", "too_long", "no_response")}
    assert counts == {"examples": 13, "captured": 1, "too_long": 1, "no_response": 11}


def test_a_source_without_answers_says_which_command_makes_them(fresh: Recipe) -> None:
    shutil.rmtree(fresh.workdir / "responses" / "alpha")
    with pytest.raises(UserError, match="Run megatron-fuse generate --source alpha first"):
        capture(Context(fresh), "alpha", "inference")


def test_a_tokenizer_of_a_larger_vocabulary_than_the_model_is_refused(fresh: Recipe, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(fresh.sources["beta"].model, mixed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(fresh.sources["gamma"].model) / name, mixed)
    options = fresh.sources["beta"].model_copy(update={"model": str(mixed), "chat_template": "chatml"})
    with pytest.raises(UserError, match="The tokenizer belongs to another model"):
        capture(Context(fresh.model_copy(update={"sources": {"beta": options}})), "beta", "training")
