"""Laws of the responses stage: an answer depends on model, prompt and seed, and on nothing that happens to
share its batch.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import FAMILIES, save_model, small_recipe, write_rows
from transformers import AutoConfig

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import model_fingerprint
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.huggingface.limits import declared_positions, max_positions
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.instructions import example_shards, load_examples, prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import (
    RESPONSES,
    Response,
    generate_responses,
    response_shards,
)
from megatron_fuse.stages import Context


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family, seed=seed) for seed, family in enumerate(FAMILIES)}


def recipe_for(models: dict[str, Path], workdir: Path, examples: int = 10, **sections: object) -> Recipe:
    """Questions of very different lengths, in shards of four, instructions prepared."""
    rows = [
        {"id": f"e{n}", "instruction": f"{n}" + " fig" * (n * 7 % 11), "output": "A."}
        for n in range(examples)
    ]
    data = write_rows(workdir / "data.jsonl", rows)
    sections = {"responses": {"max_new_tokens": 12, "batch_tokens": 90}, "data": {"shard_size": 4}} | sections
    recipe = small_recipe(workdir / "run", data, models["llama"], models, **sections)
    prepare_instructions(Context(recipe))
    return recipe


def changed(recipe: Recipe, **sections: object) -> Recipe:
    return recipe.model_copy(
        update={
            name: value if name in ("sources", "workdir") else getattr(recipe, name).model_copy(update=value)
            for name, value in sections.items()
        }
    )


def texts(recipe: Recipe, source: str) -> list[Response]:
    return [row for shard in response_shards(Context(recipe).open(RESPONSES, source)) for row in shard]


def test_bytes_are_the_same_for_any_ranks_and_after_an_interruption(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(models, tmp_path)
    whole = generate_responses(Context(recipe), "gpt_neox")
    whole.verify()
    rows = texts(recipe, "gpt_neox")
    shards = example_shards(prepare_instructions(Context(recipe)))
    assert [row.id for row in rows] == [example.id for shard in shards for example in shard]
    assert [len(shard) for shard in response_shards(whole)] == [len(shard) for shard in shards] == [4, 4, 2]
    assert whole.counts["tokens"] == sum(row.tokens for row in rows) > 0
    assert all(row.tokens == 12 for row in rows if row.truncated)

    (whole.directory / "manifest.json").unlink()
    for name in ("shard-00001.done", "shard-00001.jsonl"):
        (whole.directory / name).unlink()
    assert generate_responses(Context(recipe), "gpt_neox").sha256 == whole.sha256

    for path in whole.directory.iterdir():
        path.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert generate_responses(Context(recipe), "gpt_neox") is None
    monkeypatch.setenv("RANK", "0")
    assert generate_responses(Context(recipe), "gpt_neox").sha256 == whole.sha256


def test_seed_source_and_options_decide_and_batch_size_does_not(
    models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(models, tmp_path)
    generate_responses(Context(recipe), "llama")
    assert Context(changed(recipe, responses={"batch_tokens": 1})).plan(RESPONSES, "llama") == Context(
        recipe
    ).plan(RESPONSES, "llama")
    with pytest.raises(UserError, match=r"options.temperature = 1.0.*0.5"):
        generate_responses(Context(changed(recipe, responses={"temperature": 0.5})), "llama")
    with pytest.raises(UserError, match="there is no 'gemma'\. Choose one of llama, mpt, gpt_neox"):
        generate_responses(Context(recipe), "gemma")
    # The same model under another name draws other answers; a source more or less leaves the others' plans
    # alone.
    twin = changed(recipe, sources=recipe.sources | {"twin": recipe.sources["llama"]})
    generate_responses(Context(twin), "twin")
    assert [row.response for row in texts(twin, "twin")] != [row.response for row in texts(twin, "llama")]
    assert Context(twin).plan(RESPONSES, "llama") == Context(recipe).plan(RESPONSES, "llama")


def test_no_answer_outgrows_positions_or_seq_length(models: dict[str, Path], tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", "mpt", positions=24)
    recipe = recipe_for(
        {**models, "short": short}, tmp_path, responses={"max_new_tokens": 99, "batch_tokens": 5000}
    )
    chat = load_format(recipe.sources["short"], "short")
    prompts = {
        e.id: len(chat.encode_prompt(e.prompt()))
        for e in load_examples(prepare_instructions(Context(recipe)))
    }
    assert min(prompts.values()) < 24 < max(prompts.values()), "the case tells nothing"
    generate_responses(Context(recipe), "short")
    for row in texts(recipe, "short"):
        assert row.tokens <= max(0, 24 - prompts[row.id])
        if prompts[row.id] >= 24:
            assert (row.response, row.truncated, row.tokens) == ("", True, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_text_only_cuts_the_answer_there_would_have_been(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    recipe = recipe_for(models, tmp_path, examples=30, responses={"max_new_tokens": 20})
    stops = ["e", "o", "fig", "1", "+ 3"]
    options = recipe.sources[family].model_copy(update={"stop": stops})
    stopping = changed(recipe, sources=recipe.sources | {family: options}, workdir=tmp_path / "stopping")
    prepare_instructions(Context(stopping))
    for each in (recipe, stopping):
        generate_responses(Context(each), family)
    pairs = list(zip(texts(recipe, family), texts(stopping, family), strict=True))
    cut = 0
    for plain, stopped in pairs:
        # None of these lies within another one: the one that begins first is whole first.
        places = [plain.response.find(stop) for stop in stops if stop in plain.response]
        if places:
            cut += 1
            assert (stopped.response, stopped.truncated) == (plain.response[: min(places)], False)
            assert stopped.tokens <= plain.tokens  # as many where the last token holds the stop text and more
        else:
            assert stopped == plain
    assert 0 < cut < len(pairs), "the case tells nothing"
    assert Context(stopping).plan(RESPONSES, family).options["stop"] == stops


def test_special_tokens_and_padded_columns_are_never_an_answer(
    models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(models, tmp_path, examples=40, responses={"max_new_tokens": 20, "temperature": 50.0})
    for source in ("llama", "mpt"):
        chat = load_format(recipe.sources[source], source)
        generate_responses(Context(recipe), source)
        rows = texts(recipe, source)
        assert sum(row.tokens for row in rows) > 500  # nearly uniform over 300 ids, three of them special
        for row in rows:  # every generated token has left its bytes
            assert row.tokens <= len(row.response.encode()), row
            assert not any(name in row.response for name in chat.tokenizer.added_tokens), row


def test_weights_that_overflow_are_named_with_source_and_example(
    models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(models, tmp_path)
    model = load_causal_lm(recipe.sources["llama"])
    model.get_output_embeddings().weight.data[7] = 3e38  # finite itself; sums of a few are not
    broken = tmp_path / "broken"
    save_model(broken, "llama")
    model.save_pretrained(broken)
    with pytest.raises(UserError, match="broken: the logits are NaN or infinite in the answer to example 'e"):
        generate_responses(Context(recipe_for({**models, "nan": broken}, tmp_path)), "nan")


def test_responses_of_other_instructions_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(models, tmp_path)
    generate_responses(Context(recipe), "llama")
    for path in (recipe.workdir / "instructions").iterdir():
        path.unlink()
    other = recipe_for(models, tmp_path, examples=11)
    with pytest.raises(UserError, match=r"was made with inputs\.instructions = "):
        Context(other).open(RESPONSES, "llama")


def test_fingerprint_sees_a_change_in_the_middle_of_the_weights(tmp_path: Path) -> None:
    """An adapter merged into one matrix leaves config, header and both ends of the file as they were."""

    def fingerprint(name: str, config: str = "{}", **changes: np.ndarray) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        # 160 kB each.
        tensors = {key: np.zeros(40_000, np.float32) for key in ("embedding", "middle", "norm")}
        save_file(tensors | changes, tmp_path / name / "model.safetensors")
        return model_fingerprint(tmp_path / name)

    first = fingerprint("first")
    assert fingerprint("same") == first
    for key in ("embedding", "middle", "norm"):
        assert fingerprint(key, **{key: np.full(40_000, 1e-6, np.float32)}) != first, key
    assert fingerprint("config", config="{ }") != first
    assert fingerprint("shape", norm=np.zeros((200, 200), np.float32)) != first
    (tmp_path / "same/modeling_own.py").write_text("# what trust_remote_code would run")
    assert model_fingerprint(tmp_path / "same") != first


def test_a_fingerprint_is_of_the_shards_that_the_index_names(tmp_path: Path) -> None:
    """Two sets of shards lie in one directory: the index decides which is the model.

    One that nothing names changes nothing.
    """
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "new").mkdir()

    def fingerprint_of(*shards: str) -> str:
        index = {"weight_map": {f"w{number}": shard for number, shard in enumerate(shards)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return model_fingerprint(tmp_path)

    for number, name in enumerate(
        ("a-1.safetensors", "a-2.safetensors", "b-2.safetensors", "new/a-2.safetensors")
    ):
        save_file({f"w{min(number, 1)}": np.full(9, number, np.float32)}, tmp_path / name)
    seconds = ("a-2.safetensors", "b-2.safetensors", "new/a-2.safetensors")
    found = {fingerprint_of("a-1.safetensors", second) for second in seconds}
    assert len(found) == 3
    first = fingerprint_of("a-1.safetensors", "a-2.safetensors")
    (tmp_path / "b-2.safetensors").unlink()
    assert fingerprint_of("a-1.safetensors", "a-2.safetensors") == first
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "new/a-2.safetensors").unlink()
    assert model_fingerprint(tmp_path) == first  # without an index: every file that is there


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_as_long_as_its_config_says(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Whether transformers reads the config or nobody but us, whatever the key, and whatever else the
    model reads.
    """
    declared = declared_positions(models[family])
    assert declared == max_positions(AutoConfig.from_pretrained(models[family])) > 0
    content = json.loads((models[family] / "config.json").read_text())
    for config, expected in (({"text_config": content, "max_position_embeddings": 1}, declared), ({}, None)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert declared_positions(tmp_path) == expected
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match=rf"{tmp_path}/config.json: not valid JSON: "):
        declared_positions(tmp_path)


def test_missing_models_are_refused_with_the_key(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(models, tmp_path, examples=1)
    (tmp_path / "empty").mkdir()
    for place, message in [("gone", "is not a directory and not a model"), ("empty", "no config.json")]:
        options = recipe.sources["mpt"].model_copy(update={"model": str(tmp_path / place)})
        with pytest.raises(UserError, match=f"sources.x.model: .*{message}"):
            load_causal_lm(options, where="sources.x")


def test_other_ends_in_generation_config_are_other_answers(models: dict[str, Path], tmp_path: Path) -> None:
    """An end that the template and the tokenizer do not name decides where answers end, and so which
    answers they are.
    """
    name = next(iter(models))
    model = shutil.copytree(models[name], tmp_path / "model")
    recipe = recipe_for(models | {name: model}, tmp_path)
    generate_responses(Context(recipe), name)
    generate_responses(Context(recipe), name)  # finds them done
    path = model / "generation_config.json"
    ends = json.loads(path.read_text()) if path.exists() else {}
    further = load_format(recipe.sources[name], name).tokenizer.added_tokens["<|im_start|>"]
    path.write_text(json.dumps(ends | {"eos_token_id": [further]}))
    with pytest.raises(UserError, match="further ends"):
        generate_responses(Context(recipe), name)
