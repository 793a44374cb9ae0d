"""Laws of reward models behind a server: they give the rewards of the same model in process, and what is no
reward is refused.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_server import Act, scripted
from local_teacher import Lie, LocalRewards
from log_lines import logged
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.open_ended.reward_judge import reward_models_of
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring.scores import SCORES, load_scores, require_backend, score_responses
from megatron_fuse.stages import Context

NAME = "judge"
SOURCES = ("a", "b")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Answers of two sources to seven questions; one is empty."""
    root = tmp_path_factory.mktemp("rewards")
    model = save_model(root / "model", "llama", seed=2)
    save_model(root / "reward", "llama", seed=3, reward=True)
    rows = [{"id": f"e{n}", "instruction": f"Q{n}?" + " fig" * n, "output": "A."} for n in range(7)]
    sources = {}
    for name in SOURCES:
        answers = [{"id": f"e{n}", "response": ("pear " * n + name) * (n != 3)} for n in range(7)]
        answers = write_rows(root / f"{name}.jsonl", answers)
        sources[name] = {"model": str(model), "responses": str(answers)}
    recipe = small_recipe(
        root / "run",
        write_rows(root / "data.jsonl", rows),
        model,
        sources,
        reward_models={NAME: {"model": str(root / "reward"), "dtype": "fp32"}},
        schedule={"preset": "profuser"},
        data={"shard_size": 3},
    )
    prepare_instructions(Context(recipe))
    for name in SOURCES:
        generate_responses(Context(recipe), name)
    score_responses(Context(recipe), NAME)
    return recipe


@pytest.fixture
def rewards(world: Recipe) -> LocalRewards:
    return LocalRewards(world.workdir.parent / "reward")


def at(recipe: Recipe, url: str, workdir: Path, **options: Any) -> Recipe:
    """The recipe with this server, in a workdir of its own."""
    if not workdir.exists():
        for part in ("instructions", "responses"):
            shutil.copytree(recipe.workdir / part, workdir / part)
    content = recipe.model_dump(mode="json", by_alias=True)
    server = {"url": url, "model": "small", "timeout": 20, "max_retries": 0} | options
    content["reward_models"][NAME]["server"] = server
    return make_recipe(content | {"workdir": str(workdir)})


@pytest.mark.parametrize(
    ("engine", "endpoint", "per_token"),
    [
        ("vllm", "classify", False),
        ("vllm", "pooling", False),
        ("vllm", "pooling", True),
        ("sglang", "classify", False),
    ],
)
def test_a_served_reward_model_gives_the_rewards_of_the_model_in_process(
    world: Recipe, rewards: LocalRewards, tmp_path: Path, engine: str, endpoint: str, per_token: bool
) -> None:
    rewards.per_token = per_token
    with scripted(rewards) as server:
        recipe = at(world, server.url, tmp_path / "run", engine=engine, endpoint=endpoint)
        artifacts = score_responses(Context(recipe), NAME)
    assert len(artifacts) == len(SOURCES)
    for source in SOURCES:
        expected = load_scores(Context(world), source, NAME)
        found = load_scores(Context(recipe), source, NAME)
        assert np.isnan(expected).sum() == 1 and expected[0] != expected[1]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    probes = 2 if engine == "vllm" else 1  # vLLM is asked with and without a sigmoid
    assert len(rewards.requests) == probes + 2 * 6  # two answers to every question but one
    # Somewhere else it is the same artifact; another model's rewards are not.
    moved = at(world, "http://localhost:1/v1", tmp_path / "run", engine=engine, endpoint=endpoint)
    assert Context(moved).open(SCORES, "a", NAME) == Context(recipe).open(SCORES, "a", NAME)
    with pytest.raises(UserError, match="model"):
        Context(at(world, server.url, tmp_path / "run", engine=engine, endpoint=endpoint, model="x")).open(
            SCORES, "a", NAME
        )


LIES: dict[str, tuple[Lie, str]] = {
    "NaN": (lambda c: c["data"][0].update(probs=[float("nan")]), r"a reward of nan"),
    "null": (lambda c: c["data"][0].update(probs=[None]), r"a reward of None"),
    "text": (lambda c: c["data"][0].update(probs=["1"]), r"a reward of '1'"),
    "two labels": (lambda c: c["data"][0].update(probs=[0.5, 0.5]), r"2 rewards, but a reward model has 1"),
    "none": (lambda c: c["data"].clear(), r"not an answer of vLLM's /classify"),
    "other tokens": (
        lambda c: c["usage"].update(prompt_tokens=3),
        r"the server read 3 tokens, but \d+ were sent",
    ),
    "another model": (lambda c: c.update(model="large"), r"answers as model 'large'"),
    "no pooling": (
        lambda _: Act({"error": {"message": "The model does not support Classification API"}}, 400),
        r"refuses every request \(400 The model .*--runner pooling",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_what_is_no_reward_ends_the_run(
    world: Recipe, rewards: LocalRewards, tmp_path: Path, name: str
) -> None:
    rewards.lie, message = LIES[name]
    with scripted(rewards) as server:
        recipe = at(world, server.url, tmp_path / "run")
        with pytest.raises(UserError, match=message) as caught:
            score_responses(Context(recipe), NAME)
    assert str(caught.value).startswith(f"reward_models.{NAME}.server: ")


def test_one_refused_conversation_is_named(world: Recipe, rewards: LocalRewards, tmp_path: Path) -> None:

    def lie(content: dict[str, Any]) -> Act | None:
        too_long = content["usage"]["prompt_tokens"] > len(rewards.requests[0]["input"]) + 10
        return Act({"error": {"message": "maximum context length is 9"}}, 400) if too_long else None

    rewards.lie = lie
    with scripted(rewards) as server:
        recipe = at(world, server.url, tmp_path / "run")
        with pytest.raises(
            UserError, match=r"no reward for example 'e\d, answer \d': 400 maximum context length is 9"
        ):
            score_responses(Context(recipe), NAME)
        rewards.lie = None
        assert len(score_responses(Context(recipe), NAME)) == len(SOURCES)  # with the shards that are done


def test_a_server_that_always_applies_its_sigmoid_is_reported(
    world: Recipe, rewards: LocalRewards, tmp_path: Path
) -> None:
    rewards.ignores_activation = True
    with scripted(rewards) as server, logged("warning") as text:
        score_responses(Context(at(world, server.url, tmp_path / "run")), NAME)
    assert text.getvalue().count("the same reward with and without use_activation") == 1


def test_a_served_reward_model_needs_its_model_and_judges_no_open_ended_answers(
    world: Recipe, tmp_path: Path
) -> None:
    recipe = at(world, "http://localhost:1/v1", tmp_path / "run")
    require_backend(recipe, NAME, "server")
    with pytest.raises(UserError, match=r"--backend hf: reward_models.judge.server is set\. Remove it"):
        require_backend(recipe, NAME, "hf")
    with pytest.raises(UserError, match=r"--backend server: reward_models.judge.server is not set"):
        require_backend(world, NAME, "server")
    with pytest.raises(UserError, match=r"judge.server: a reward model behind a server does not judge"):
        reward_models_of(recipe, {})
    content = recipe.model_dump(mode="json", by_alias=True)
    server = content["reward_models"][NAME]["server"]
    for options, message in (
        ({"server": server, "scores": {"path": "f"}}, r"server is set, but model is not"),
        ({"model": "m", "server": server | {"engine": "sglang", "endpoint": "pooling"}}, r"one of vLLM"),
        ({"model": "m", "server": server | {"url": "http://me:secret@host"}}, r"url must not hold a user"),
    ):
        content["reward_models"][NAME] = options
        with pytest.raises(UserError, match=message):
            make_recipe(content)
