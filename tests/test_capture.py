"""Laws of capture: sparse rows say exactly what the dense logits say, whatever the batch, for the token that comes next."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_fusion import SOURCES, fusion_recipe, save_models, write_data
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from megatron_fuse.capture import STATUSES, CaptureShard, capture, distributions, open_capture, read_capture_shard
from megatron_fuse.capture.distributions import NotFiniteError, sparse_rows
from megatron_fuse.capture.reading import SourceReader, logits_at, token_budget_batches
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import load_examples, open_instructions, prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses, open_responses, response_shards
from megatron_fuse.sources.huggingface import load_causal_lm, load_format, source_options


def kept_by_definition(z: np.ndarray, top_k: int, top_p: float, filter: str, temperature: float) -> list[int]:
    """Ids that the filter keeps of one row of float64 logits."""
    order = np.argsort(-z, kind="stable")[:top_k]
    among = np.arange(len(z)) if filter == "full_vocabulary" else order
    scale = 1.0 if filter == "full_vocabulary" else temperature
    weights = np.exp((z - z.max()) / scale)
    mass, kept = 0.0, []
    for index in order:
        if (kept and mass >= top_p) or z[index] == -np.inf:
            break
        kept.append(int(index))
        mass += weights[index] / weights[among].sum()
    return kept


# top_k beyond the vocabulary; top_p that keeps one entry, some, all; a temperature above and below 1
@pytest.mark.parametrize(("top_k", "top_p"), [(10, 0.95), (3, 1.0), (64, 0.9999), (10, 1e-6)])
@pytest.mark.parametrize("filter", ["full_vocabulary", "hugging_face"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_rows_give_back_the_dense_distribution(
    monkeypatch: pytest.MonkeyPatch, top_k: int, top_p: float, filter: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(distributions, "_CPU_CHUNK", 300)  # eight rows at a time, and one in the end
    seed, rows, vocab, temperatures = 3, 41, 37, [2.0, 0.5]
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * 3 + 50).to(dtype)
    if dtype is torch.bfloat16:  # ties are common in bf16; which of them is kept is nobody's concern: make them differ
        logits = (torch.rand(rows, vocab, generator=generator).argsort(1) / 4).to(dtype)
    logits[:, 5] = -torch.inf  # masked columns are legal
    tokens = torch.randint(6, vocab, (rows,), generator=generator)
    sparse = sparse_rows(logits, tokens, top_k=top_k, top_p=top_p, filter=filter, temperatures=temperatures)
    dense = logits.double()
    bounds = np.concatenate([[0], np.cumsum(sparse.counts, dtype=np.int64)])
    for row in range(rows):
        span = slice(bounds[row], bounds[row + 1])
        ids = sparse.ids[span]
        assert ids.tolist() == kept_by_definition(dense[row].numpy(), top_k, top_p, filter, temperatures[0]), (
            f"{seed=} {row=}"
        )
        for column, temperature in enumerate([1.0, *temperatures]):
            expected = torch.log_softmax(dense[row] / temperature, 0)[ids.tolist()].numpy()
            found = sparse.logits[span] / temperature - sparse.lse[row, column]
            np.testing.assert_allclose(found, expected, atol=2e-6)  # fp32 sums of exponentials of numbers up to 20
        expected = torch.log_softmax(dense[row], 0)[tokens[row]]
        np.testing.assert_allclose(sparse.token_logprobs[row], expected, atol=4e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all masked"])
def test_rows_that_are_no_distribution_are_refused(monkeypatch: pytest.MonkeyPatch, bad: float | str) -> None:
    monkeypatch.setattr(distributions, "_CPU_CHUNK", 34)  # three rows at a time: the fifth is in the second chunk
    logits = torch.zeros(7, 11)
    logits[4] = -torch.inf if bad == "all masked" else logits[4]
    if bad != "all masked":
        logits[4, 9] = bad
    with pytest.raises(NotFiniteError) as error:
        sparse_rows(
            logits, torch.zeros(7, dtype=torch.int64), top_k=3, top_p=1.0, filter="full_vocabulary", temperatures=[2.0]
        )
    assert error.value.row == 4


def test_batches_are_a_partition_within_the_budget() -> None:
    seed = 5
    lengths = np.random.default_rng(seed).integers(1, 300, 100).tolist()
    for budget in (1, 250, 1000, 100_000):
        batches = token_budget_batches(lengths, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(100)), f"seed {seed}"
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches), f"seed {seed}"
    assert len(token_budget_batches(lengths, 100_000)) == 1
    assert token_budget_batches([], 10) == []


def test_logits_at_is_the_model_itself_where_logits_are_changed_after_the_head() -> None:
    """Gemma caps its logits after the head; GPT-2 has its head tied."""
    torch.manual_seed(0)
    small = {"vocab_size": 61, "max_position_embeddings": 32}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, **sizes, num_key_value_heads=1, final_logit_softcapping=0.05))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    tokens = torch.randint(0, 61, (3, 7))
    positions = torch.tensor([0, 6, 8, 9, 20])
    for model in (gemma.eval(), gpt2.eval()):
        with torch.inference_mode():
            expected = model(tokens).logits.flatten(0, 1)[positions]
            found = logits_at(model, tokens, torch.ones_like(tokens), positions)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert expected.shape == found.shape == (5, 61)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """(directory with instructions and responses, models): the stages before capture are done once."""
    root = tmp_path_factory.mktemp("capture")
    models = save_models(root / "models")
    write_data(root)
    recipe = fusion_recipe(root, models)
    prepare_instructions(recipe, progress=str)
    for source in SOURCES:
        generate_responses(recipe, source, progress=str)
    return root, models


def changed(recipe: Recipe, **sections: object) -> Recipe:
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=value) for name, value in sections.items()}
    )


@pytest.fixture
def fresh(world: tuple[Path, dict[str, Path]], tmp_path: Path) -> Recipe:
    """The world's recipe in a workdir of its own."""
    root, models = world
    for name in ("instructions", "responses"):
        shutil.copytree(root / "run" / name, tmp_path / "run" / name)
    return fusion_recipe(root, models).model_copy(update={"workdir": tmp_path / "run"})


def read(recipe: Recipe, source: str, mode: str) -> list[CaptureShard]:
    return [read_capture_shard(path) for path in open_capture(recipe, source, mode).files(".safetensors")]


# 1: every example alone; 150: two or three together; 10**6: whole shards
@pytest.mark.parametrize(("source", "batch_tokens"), [("alpha", 1), ("beta", 150), ("gamma", 10**6)])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_capture_equals_reading_one_example_at_a_time(fresh: Recipe, source: str, batch_tokens: int, mode: str) -> None:
    recipe = changed(fresh, capture={"batch_tokens": batch_tokens})
    capture(recipe, source, mode, progress=str)
    shards = read(recipe, source, mode)
    options = source_options(recipe, source)
    model, chat = load_causal_lm(options), load_format(options, source)
    examples = load_examples(open_instructions(recipe))
    answers = [answer for shard in response_shards(open_responses(recipe, source)) for answer in shard]
    place = [(shard, index) for shard in shards for index in range(len(shard.status))]
    seen = set()
    for example, answer, (shard, index) in zip(examples, answers, place, strict=True):
        text, truncated = (answer.response, answer.truncated) if mode == "inference" else (example.response, False)
        seen.add((STATUSES[shard.status[index]], truncated))
        span = shard.rows(index)
        if not text.strip():
            assert shard.status[index] == STATUSES.index("no_response")
            assert span.start == span.stop
            assert np.isnan(shard.ce_sum[index])
            continue
        encoded = chat.encode_conversation(example.prompt(chat.system), text, stop=not truncated)
        with torch.inference_mode():
            logits = model(torch.from_numpy(encoded.ids[None].astype(np.int64))).logits[0].double()
        dense = torch.log_softmax(logits, 1)
        labels = encoded.ids[encoded.prompt_length :]
        # The distribution after the last prompt token predicts the first response token, and so on.
        rows = np.arange(encoded.prompt_length, len(encoded.ids)) - 1
        expected = dense[rows, labels].numpy()
        assert shard.tokens[span].tolist() == labels.tolist()
        assert shard.starts[span].tolist() == encoded.starts.tolist()
        np.testing.assert_allclose(shard.token_logprobs[span], expected, atol=2e-4)  # fp32 attention in other shapes
        nats = -expected[: len(encoded.ends)].sum()
        np.testing.assert_allclose(shard.ce_sum[index], nats, rtol=1e-5)
        assert bool(shard.stop[index]) == (not truncated)
        assert np.isnan(shard.ce_stop[index]) == truncated
        assert shard.response_bytes[index] == len(text.encode())
        entries = np.concatenate([[0], np.cumsum(shard.counts, dtype=np.int64)])[span.start : span.stop + 1]
        tempered = torch.log_softmax(logits / 2.0, 1)
        for row, first, last in zip(rows, entries[:-1], entries[1:], strict=True):
            ids = shard.entry_ids[first:last].tolist()
            assert ids == dense[row].topk(last - first).indices.tolist()
            np.testing.assert_allclose(shard.logprobs(1, 2.0)[first:last], tempered[row, ids], atol=2e-4)
    wanted = {("captured", False)} | ({("captured", True), ("no_response", False)} if mode == "inference" else set())
    assert wanted <= seen, "the data holds no truncated or empty answer: the test tells less than it says"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_two_ranks_and_an_interrupted_run_give_the_same_bytes(
    fresh: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = capture(fresh, "beta", "training", progress=str)
    assert whole is not None
    expected = content(whole.directory)
    shutil.rmtree(whole.directory)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert capture(fresh, "beta", "training", progress=str) is None
    monkeypatch.setenv("RANK", "0")
    assert capture(fresh, "beta", "training", progress=str) is not None
    assert content(whole.directory) == expected
    shutil.rmtree(whole.directory)
    monkeypatch.setenv("WORLD_SIZE", "1")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(fresh, "beta", "training", progress=interrupt)
    with pytest.raises(UserError, match="is incomplete: run tools/capture_teacher"):
        open_capture(fresh, "beta", "training")
    (whole.directory / "shard-00001.safetensors").write_bytes(b"half a file")
    capture(fresh, "beta", "training", progress=str)
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
    artefact = capture(recipe, "late", "training", progress=str)
    assert artefact is not None
    chat = load_format(late, "late")
    examples = load_examples(open_instructions(recipe))
    lengths = [len(chat.encode_conversation(e.prompt(chat.system), e.response).ids) for e in examples]
    expected = [length - 1 > 150 for length in lengths]
    status = np.concatenate([shard.status for shard in read(recipe, "late", "training")])
    assert (status == STATUSES.index("too_long")).tolist() == expected
    assert artefact.counts["too_long"] == sum(expected)
    assert 0 < sum(expected) < len(expected), f"lengths {lengths} do not try both sides"


def test_numbers_that_are_none_are_refused_by_source_example_and_row(
    fresh: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = load_format(fresh.sources["beta"], "beta")
    example = load_examples(open_instructions(fresh))[1]
    ids = chat.encode_conversation(example.prompt(chat.system), example.response).ids

    def overflow(model: object, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = logits_at(model, tokens, mask, positions)
        batch_row = int((tokens[:, : len(ids) - 1] == torch.from_numpy(ids[:-1])).all(1).nonzero()[0])
        own = (positions // tokens.shape[1] == batch_row).nonzero()
        logits[own[3], 7] = torch.nan
        return logits

    monkeypatch.setattr("megatron_fuse.capture.reading.logits_at", overflow)
    with pytest.raises(UserError, match="NaN or infinite logits in example 'e1', response row 3: "):
        capture(fresh, "beta", "training", progress=str)
    assert not list((fresh.workdir / "captures/beta/training").glob("shard*"))


def test_a_capture_of_something_else_is_refused_with_both_values(fresh: Recipe) -> None:
    artefact = capture(fresh, "beta", "training", progress=str)
    assert artefact is not None
    for recipe, key in [
        (changed(fresh, capture={"top_k": 4}), "top_k = 10, but the recipe's source 'beta' has 4"),
        (changed(fresh, loss={"teacher_temperature": 3.0}), r"temperatures = \[2.0\]"),
        (fresh.model_copy(update={"sources": {"beta": fresh.sources["gamma"]}}), "tokenizer = "),
    ]:
        with pytest.raises(UserError, match=key):
            open_capture(recipe, "beta", "training")
    with pytest.raises(UserError, match=r"options.top_k = 10, but now options.top_k = 4"):
        capture(changed(fresh, capture={"top_k": 4}), "beta", "training", progress=str)
    # Another budget or another source in the recipe is the same capture.
    same = changed(fresh, capture={"batch_tokens": 77}).model_copy(update={"sources": {"beta": fresh.sources["beta"]}})
    assert open_capture(same, "beta", "training").sha256 == artefact.sha256


def test_a_damaged_shard_is_refused_by_name(fresh: Recipe) -> None:
    artefact = capture(fresh, "alpha", "inference", progress=str)
    assert artefact is not None
    path = artefact.files(".safetensors")[1]
    good = path.read_bytes()
    for damaged in (good[:-9], b"", good[:100]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"shard-00001.safetensors: cannot be read as a capture"):
            read_capture_shard(path)
    path.write_bytes(good)
    shard = read_capture_shard(path)
    shard.lse[1, 1] = np.nan
    shard.save(path)
    with pytest.raises(UserError, match="lse is not finite in row 1"):
        read_capture_shard(path)


def test_a_shard_of_which_nothing_was_captured_can_be_read(fresh: Recipe, tmp_path: Path) -> None:
    examples = load_examples(open_instructions(fresh))[:3]
    SourceReader(fresh, "alpha", model=None).capture_shard(examples, [None] * 3).save(tmp_path / "empty.safetensors")
    shard = read_capture_shard(tmp_path / "empty.safetensors")
    assert [STATUSES[code] for code in shard.status] == ["no_response"] * 3
    assert shard.offsets.tolist() == [0] * 4 and shard.lse.shape == (0, 2) and np.isnan(shard.ce_sum).all()


def test_a_source_without_answers_says_which_command_makes_them(fresh: Recipe) -> None:
    shutil.rmtree(fresh.workdir / "responses" / "alpha")
    with pytest.raises(UserError, match="generate_responses"):
        capture(fresh, "alpha", "inference", progress=str)


def test_a_tokenizer_of_a_larger_vocabulary_than_the_model_is_refused(fresh: Recipe, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(fresh.sources["beta"].model, mixed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(fresh.sources["gamma"].model) / name, mixed)
    options = fresh.sources["beta"].model_copy(update={"model": str(mixed), "chat_template": "chatml"})
    with pytest.raises(UserError, match="the tokenizer belongs to another model"):
        capture(fresh.model_copy(update={"sources": {"beta": options}}), "beta", "training", progress=str)
