"""Laws of the scores stage: one number for each answer in the examples' order, the same bytes however the
work was cut up.
"""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from log_lines import at_every_shard
from small_models import FAMILIES, save_model, small_recipe, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import TARGET, Recipe, RewardModelOptions, dump_recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring import scores as stage
from megatron_fuse.scoring.scores import SCORES, load_scores, require_backend, score_responses
from megatron_fuse.stages import Context

ANSWERS = {  # by example; None: the file has no answer
    "a": {"1": "yes", "2": "", "3": "no fig", "4": None, "5": "long " * 99, "6": "\n", "7": "yes"},
    "b": {
        "1": "yes",
        "2": "pear",
        "3": "fig, pear, apple",
        "4": "The lazy dog.",
        "5": "👍",
        "6": "42",
        "7": "it is 42",
    },
    "c": {"1": "It is 12.", "2": "", "3": "fig", "4": "dog " * 9, "5": "no", "6": "12 + 30", "7": None},
}
IDS = list(ANSWERS["a"])


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reward_models")
    return {
        family: save_model(root / family, family, seed=seed, reward=True)
        for seed, family in enumerate(FAMILIES)
    }


def straight_score(directory: Path, example: str, response: str) -> float:
    """transformers alone: its own template and tokenizer, one conversation, no padding, its own read-out
    (the last token).
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    turns = [{"role": "user", "content": f"Question {example}"}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(directory).eval()(ids).logits.item()


def answered(models: dict[str, Path], root: Path, sources: str = "ab", **sections: object) -> Recipe:
    """A recipe whose sources, or the target under its name, have answered from files, in shards of two."""
    rows = [{"id": name, "instruction": f"Question {name}", "output": "A"} for name in IDS]
    root.mkdir(exist_ok=True)
    options = {}
    for source, texts in ANSWERS.items():
        given = [{"id": name, "response": text} for name, text in texts.items() if text is not None]
        path = write_rows(root / f"{source}.jsonl", given)
        options[source] = {"model": str(models["llama"]), "dtype": "fp32", "responses": str(path)}
    recipe = small_recipe(
        root / "run",
        write_rows(root / "data.jsonl", rows),
        models["mpt"],  # none of the sources: its own answers have a name of their own
        {source: options[source] for source in sources},
        reward_models={name: {"model": str(path), "dtype": "fp32"} for name, path in models.items()}
        | sections.pop("reward_models", {}),  # type: ignore[operator]
        data={"shard_size": 2},
        schedule={"preset": "profuser"},
        **sections,
    )
    prepare_instructions(Context(recipe))
    for source in sources:
        generate_responses(Context(recipe), source)
    return recipe


def scored(recipe: Recipe, reward_model: str = "llama", **options: object) -> dict[str, bytes]:
    score_responses(Context(recipe), reward_model, **options)  # type: ignore[arg-type]
    return contents(recipe)


def contents(recipe: Recipe) -> dict[str, bytes]:
    root = recipe.workdir / "scores"
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


class Encodings:
    """The texts that reward models read while it is installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        encode = stage.RewardModel.encode

        def listening(
            reward_model: stage.RewardModel, messages: list, response: str, tools: list | None
        ) -> np.ndarray:
            self.texts.append(response)
            return encode(reward_model, messages, response, tools)

        monkeypatch.setattr(stage.RewardModel, "encode", listening)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> Encodings:
    return Encodings(monkeypatch)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_scores_are_in_example_order_and_what_cannot_be_scored_is_nan(
    reward_models: dict[str, Path], tmp_path: Path, share_prompts: bool
) -> None:
    recipe = answered(
        reward_models, tmp_path, "abc", scoring={"share_prompts": share_prompts, "batch_tokens": 300}
    )
    artifacts = score_responses(Context(recipe), "mpt")
    assert [artifact.counts for artifact in artifacts] == [
        {"examples": 7, "unscored": unscored} for unscored in (4, 0, 2)
    ]
    for artifact, (source, texts) in zip(artifacts, ANSWERS.items(), strict=True):
        artifact.verify()
        scores = load_scores(Context(recipe), source, "mpt")
        assert scores.dtype == np.float32
        unscored = [not (text or "").strip() or len(text) > 400 for text in texts.values()]
        expected = [
            np.nan if out else straight_score(reward_models["mpt"], name, text)
            for out, (name, text) in zip(unscored, texts.items(), strict=True)
        ]
        np.testing.assert_allclose(scores, expected, atol=1e-5, err_msg=source)


def test_how_it_was_computed_is_no_part_of_a_plan(reward_models: dict[str, Path], tmp_path: Path) -> None:
    recipe = answered(reward_models, tmp_path)
    other = recipe.model_copy(
        update={
            "sources": {"a": recipe.sources["a"]},
            "scoring": recipe.scoring.model_copy(update={"batch_tokens": 7, "share_prompts": False}),
        }
    )
    assert Context(other).plan(SCORES, "a", "mpt") == Context(recipe).plan(SCORES, "a", "mpt")
    assert (
        Context(recipe).plan(SCORES, "a", "mpt").inputs["model"]
        != Context(recipe).plan(SCORES, "a", "llama").inputs["model"]
    )


# After each of the eight times (four shards of two sources) that a shard was marked: in the middle of a
# shard's two, or between shards.
@pytest.mark.parametrize("cut", range(1, 9))
def test_cut_off_anywhere_a_rerun_ends_with_the_same_bytes(
    reward_models: dict[str, Path], tmp_path: Path, cut: int
) -> None:
    recipe = answered(reward_models, tmp_path)
    whole = scored(recipe)
    shutil.rmtree(recipe.workdir / "scores")
    lines = []

    def cutting(line: str) -> None:
        lines.append(line)
        if len(lines) == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), at_every_shard(cutting):
        score_responses(Context(recipe), "llama")
    assert not list((recipe.workdir / "scores").rglob("manifest.json"))
    assert scored(recipe) == whole


# 3: ranks with different numbers of shards; 5: one without any
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_ranks_ends_with_the_same_bytes(
    reward_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    recipe = answered(reward_models, tmp_path)
    one = scored(recipe)
    shutil.rmtree(recipe.workdir / "scores")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    finished = []
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        finished.append(len(score_responses(Context(recipe), "llama")))
    assert finished == [0] * (world_size - 1) + [2]
    assert contents(recipe) == one


def test_a_source_that_joins_later_is_scored_alone(
    reward_models: dict[str, Path], tmp_path: Path, encodings: Encodings
) -> None:
    together = scored(answered(reward_models, tmp_path / "together", "abc"))
    before = scored(answered(reward_models, tmp_path / "joined", "ab"))
    encodings.texts.clear()
    after = scored(answered(reward_models, tmp_path / "joined", "abc"))
    assert {name: after[name] for name in before} == before
    assert set(encodings.texts) == {text for text in ANSWERS["c"].values() if text}
    for name in sorted(together):
        if name.endswith(".npy"):
            values = [np.frombuffer(files[name][-4:], np.float32) for files in (together, after)]
            np.testing.assert_allclose(*values, atol=1e-5, err_msg=name)


def test_a_source_that_joins_an_unfinished_run_leaves_whole_shards_alone(
    reward_models: dict[str, Path], tmp_path: Path, encodings: Encodings
) -> None:
    def cutting(line: str) -> None:
        if "/b/" in line and "shard 2/4" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), at_every_shard(cutting):
        score_responses(Context(answered(reward_models, tmp_path, "ab")), "llama")
    encodings.texts.clear()
    scored(answered(reward_models, tmp_path, "abc"))
    rest = [text for texts in (ANSWERS["a"], ANSWERS["b"]) for text in list(texts.values())[4:]]
    wanted = [text for text in [*rest, *ANSWERS["c"].values()] if (text or "").strip()]
    assert sorted(encodings.texts) == sorted(wanted)


def test_only_the_named_sources_are_scored(reward_models: dict[str, Path], tmp_path: Path) -> None:
    recipe = answered(reward_models, tmp_path, "abc")
    assert {name.split("/")[0] for name in scored(recipe, sources=["c", "a"])} == {"a", "c"}


def test_a_truncated_answer_is_scored_as_if_it_had_ended(
    reward_models: dict[str, Path], tmp_path: Path
) -> None:
    scores = {}
    for truncated in (False, True):
        recipe = answered(reward_models, tmp_path / str(truncated))
        rows = [{"id": name, "response": "The quick", "truncated": truncated} for name in IDS]
        write_rows(tmp_path / str(truncated) / "a.jsonl", rows)
        shutil.rmtree(recipe.workdir / "responses/a")
        counts = generate_responses(Context(recipe), "a").counts
        assert counts["truncated"] == 7 * truncated
        scored(recipe)
        scores[truncated] = load_scores(Context(recipe), "a", "llama")
    np.testing.assert_array_equal(scores[True], scores[False])
    assert np.isfinite(scores[True]).all()


def test_the_target_s_own_answers_are_scored_where_its_reward_orders_the_examples(
    reward_models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = answered(reward_models, tmp_path, "b")
    own = recipe.target.model_copy(update={"responses": recipe.sources["b"].responses})
    schedule = recipe.schedule.model_copy(update={"order": "target_reward"})
    recipe = recipe.model_copy(update={"target": own, "schedule": schedule})
    generate_responses(Context(recipe), TARGET)
    assert {name.split("/")[0] for name in scored(recipe)} == {"b", TARGET}
    # The same texts.
    np.testing.assert_allclose(
        load_scores(Context(recipe), TARGET, "llama"), load_scores(Context(recipe), "b", "llama"), atol=1e-5
    )


def test_nothing_is_loaded_where_nothing_is_to_be_done(
    reward_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = answered(reward_models, tmp_path)
    first = score_responses(Context(recipe), "llama")
    monkeypatch.setattr(stage, "load_reward_model", None)
    assert [a.sha256 for a in score_responses(Context(recipe), "llama")] == [a.sha256 for a in first]


def test_scores_from_a_file_need_no_model_and_are_bound_to_the_file(
    reward_models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"id": name, "scores": {"a": float(name), "b": -float(name)}} for name in IDS]
    path = write_rows(tmp_path / "given.jsonl", rows)
    recipe = answered(reward_models, tmp_path, reward_models={"given": {"scores": str(path)}})
    assert [artifact.counts["unscored"] for artifact in score_responses(Context(recipe), "given")] == [
        3,
        0,
    ]
    np.testing.assert_array_equal(
        load_scores(Context(recipe), "a", "given"), [1, np.nan, 3, np.nan, 5, np.nan, 7]
    )
    np.testing.assert_array_equal(load_scores(Context(recipe), "b", "given"), [-1, -2, -3, -4, -5, -6, -7])
    plan = Context(recipe).plan(SCORES, "a", "given")
    assert set(plan.inputs) == {"responses", "scores file"}
    write_rows(path, rows[1:])
    with pytest.raises(UserError, match=r"inputs\.scores file = .*, but now"):
        score_responses(Context(recipe), "given")
    with pytest.raises(UserError, match=r"inputs\.scores file = .*, but now"):
        load_scores(Context(recipe), "a", "given")
    path.unlink()
    load_scores(Context(recipe), "a", "given")  # which has no need of the file


def test_a_file_without_a_source_is_refused_before_anything_is_written(
    reward_models: dict[str, Path], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "given.jsonl", [{"id": name, "scores": {"a": 1.0}} for name in IDS])
    recipe = answered(reward_models, tmp_path, reward_models={"given": {"scores": str(path)}})
    with pytest.raises(UserError, match="there is no score of 'b'"):
        score_responses(Context(recipe), "given")
    assert contents(recipe) == {}


def test_the_backend_is_the_recipe_s(reward_models: dict[str, Path], tmp_path: Path) -> None:
    recipe = answered(reward_models, tmp_path, reward_models={"given": {"scores": "given.jsonl"}})
    require_backend(recipe, "given", "file")
    require_backend(recipe, "mpt", "hf")
    with pytest.raises(UserError, match=r"--backend hf: reward_models\.given\.scores names a file"):
        require_backend(recipe, "given", "hf")
    with pytest.raises(UserError, match=r"--backend file: reward_models\.mpt names a model"):
        require_backend(recipe, "mpt", "file")


def test_refusals_name_reward_model_source_and_example(
    reward_models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = answered(reward_models, tmp_path)
    with pytest.raises(UserError, match="there is no 'x'; the recipe has llama, mpt, gpt_neox"):
        score_responses(Context(recipe), "x")
    with pytest.raises(UserError, match="there is no 'x'\\. Choose one of a, b"):
        score_responses(Context(recipe), "mpt", ["x"])
    with pytest.raises(UserError, match=r"scores/a/mpt does not exist\. Run megatron-fuse score --source a"):
        load_scores(Context(recipe), "a", "mpt")


LARGE = 3e38  # finite itself; sums of a few are not


@pytest.mark.parametrize(
    ("spoil", "source", "example"),
    [
        (lambda model, ids: model.score.weight.data.fill_(LARGE), "a", "1"),
        # The token that only one answer has: the others are read in the same batch and stay finite.
        (lambda model, ids: model.get_input_embeddings().weight.data[ids("👍")[-1]].fill_(LARGE), "b", "5"),
    ],
    ids=["head", "one token"],
)
def test_weights_that_overflow_are_named_with_the_answer_that_showed_them(
    reward_models: dict[str, Path], tmp_path: Path, spoil: Callable, source: str, example: str
) -> None:
    recipe = answered(reward_models, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(reward_models["mpt"])
    tokenizer = AutoTokenizer.from_pretrained(reward_models["mpt"])
    spoil(model, lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    model.save_pretrained(tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken" / name).write_bytes((reward_models["mpt"] / name).read_bytes())
    broken = recipe.reward_models | {"bad": RewardModelOptions(model=str(tmp_path / "broken"), dtype="fp32")}
    match = rf"reward_models\.bad gives (nan|inf|-inf) to the answer of '{source}' to example '{example}'"
    with pytest.raises(UserError, match=match):
        score_responses(Context(recipe.model_copy(update={"reward_models": broken})), "bad")


TOOL = Path(__file__).parents[2] / "tools/score_responses.py"


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        ([], {"a/llama", "a/mpt", "b/llama", "b/mpt"}),  # gpt_neox does not vote
        (["--source", "b"], {"b/llama", "b/mpt"}),
        (["--reward-model", "gpt_neox"], {"a/gpt_neox", "b/gpt_neox"}),
        (["--reference"], {"a/reference", "b/reference"}),
        (["--selection-inference", "reference"], {"a/reference", "b/reference"}),
        (["--selection-inference", "reference", "--source", "a", "--reward-model", "mpt"], {"a/mpt"}),
    ],
)
def test_the_command_makes_what_the_recipe_needs_unless_it_is_told_otherwise(
    reward_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    made: set[str],
) -> None:
    sections = {
        "selection": {"reward_models": ["llama", "mpt"]},
        "reference": {"without_bertscore": "renormalize"},
    }
    recipe = answered(reward_models, tmp_path, **sections)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.setattr("sys.argv", [str(TOOL), "--recipe", str(tmp_path / "recipe.yaml"), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert end.value.code == 0
    assert {str(Path(name).parent) for name in contents(recipe) if name.endswith("manifest.json")} == made


def test_markers_say_who_was_scored_together(reward_models: dict[str, Path], tmp_path: Path) -> None:
    files = scored(answered(reward_models, tmp_path))
    assert json.loads(files["a/llama/shard-00000.done"])["together"] == ["a", "b"]
