"""A real vLLM gives the log-probabilities and the rewards of the model in process, up to the rounding of
another engine. Run by hand: tests/vllm_server.py says how.
"""

from pathlib import Path

import numpy as np
import pytest
from small_models import small_recipe, write_rows
from vllm_server import needs_vllm, save_llama_for_vllm, vllm_server

from megatron_fuse.capture import capture
from megatron_fuse.errors import UserError
from megatron_fuse.inspection.captures import compare_capture, format_comparison
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring.scores import load_scores, score_responses
from megatron_fuse.stages import Context
from megatron_fuse.text_safety import say

pytestmark = [pytest.mark.slow, needs_vllm]

EXAMPLES = 12
TEXTS = ["The quick brown fox.", "日本 and été are words. 🙂", "1 + 2 = 3, and so on: 4, 5, 6.", "Yes."]


def recipe_at(url: str, root: Path, model: Path, engine_off: bool = False, **reward: object) -> Recipe:
    rows = [
        {"id": f"e{n}", "instruction": f"Question {n}?" + " fig" * n, "output": TEXTS[n % 4] * (1 + n % 3)}
        for n in range(EXAMPLES)
    ]
    answers = [{"id": f"e{n}", "response": TEXTS[(n + 1) % 4]} for n in range(EXAMPLES)]
    root.mkdir()
    source = {"model": str(model), "responses": str(write_rows(root / "answers.jsonl", answers))}
    if not engine_off:
        source |= {"backend": "server", "server": {"url": url, "model": "small"}}
    recipe = small_recipe(
        root / "run",
        write_rows(root / "data.jsonl", rows),
        model,
        {"a": source},
        loss={"teacher_temperature": 1.0},
        schedule={"preset": "profuser"},
        data={"shard_size": 5},
        reward_models={"judge": reward} if reward else {},
    )
    prepare_instructions(Context(recipe))
    return recipe


def test_vllm_captures_what_the_model_in_process_does(tmp_path: Path) -> None:
    model = save_llama_for_vllm(tmp_path / "model", seed=5)
    other = save_llama_for_vllm(tmp_path / "other", seed=6)
    with vllm_server(model, tmp_path / "log.txt") as url:
        recipe = recipe_at(url, tmp_path / "a", model)
        artifact = capture(Context(recipe), "a", "training")
        assert artifact is not None and artifact.counts["captured"] == EXAMPLES
        # The server's limit of log-probabilities is 20 by default.
        wide = recipe_at(url, tmp_path / "b", model)
        wide = wide.model_copy(update={"capture": wide.capture.model_copy(update={"top_k": 30})})
        with pytest.raises(UserError, match=r"refuses every request \(400 .*--max-logprobs 30"):
            capture(Context(wide), "a", "training")
    found = compare_capture(Context(recipe), "a", "training", EXAMPLES)
    say(format_comparison(found))
    assert found["examples"] == EXAMPLES and found["rows"] > 200
    assert found["mean"] < 1e-4 and found["largest"] < 1e-3 and found["top1_differs"] < 0.01
    source = recipe.sources["a"].model_copy(update={"model": str(other)})
    apart = recipe.model_copy(update={"sources": {"a": source}})
    assert compare_capture(Context(apart), "a", "training", EXAMPLES)["mean"] > 0.5


@pytest.mark.parametrize("endpoint", ["classify", "pooling"])
def test_vllm_gives_the_rewards_of_the_model_in_process(tmp_path: Path, endpoint: str) -> None:
    model = save_llama_for_vllm(tmp_path / "model", seed=5)
    reward = save_llama_for_vllm(tmp_path / "reward", seed=7, reward=True)
    rewards = {}
    with vllm_server(reward, tmp_path / "log.txt", "--runner", "pooling") as url:
        server = {"url": url, "model": "small", "endpoint": endpoint}
        for name, options in {"served": {"server": server}, "local": {"dtype": "fp32"}}.items():
            recipe = recipe_at("", tmp_path / name, model, True, model=str(reward), **options)
            generate_responses(Context(recipe), "a")
            score_responses(Context(recipe), "judge")
            rewards[name] = load_scores(Context(recipe), "a", "judge")
    difference = np.abs(rewards["served"] - rewards["local"])
    mean, largest = difference.mean(), difference.max()
    say(f"{endpoint}: {EXAMPLES} rewards, |difference| mean {mean:.2g}, largest {largest:.2g}")
    assert np.ptp(rewards["local"]) > 0.1 and difference.max() < 1e-3
