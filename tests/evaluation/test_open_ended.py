"""Models answer in their own templates, an interrupted evaluation goes on, and the page shows the answers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from local_server import completion, scripted
from small_models import save_model, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation import EvaluatedModel
from megatron_fuse.evaluation.open_ended import (
    Judges,
    RewardModels,
    Sampling,
    answers,
    evaluate_open_ended,
    participants_named,
    read_prompts,
    reward_judge,
)
from megatron_fuse.evaluation.open_ended.answers import Generator
from megatron_fuse.evaluation.open_ended.records import Records
from megatron_fuse.evaluation.open_ended.results import OpenEndedResults
from megatron_fuse.recipe import RewardModelOptions

FEW = Sampling(max_new_tokens=6)
ROWS = [
    {"question_id": 1, "category": "math", "turns": ["What is 12 + 30?", "And the fox?"]},
    {"question_id": 2, "category": "math", "turns": ["Sort: pear, apple, fig.", "The lazy dog?"]},
    {"instruction": "The quick <b>brown</b> fox", "input": "jumps", "dataset": "koala"},
]
FILE = {
    "id": "f",
    "instruction": "<script>alert(1)</script>",
    "responses": {"one": "fig", "two": "<i>a fig</i>"},
}


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory: pytest.TempPathFactory) -> RewardModels:
    root = tmp_path_factory.mktemp("reward models")
    options = {
        name: RewardModelOptions(
            model=str(save_model(root / name, "llama", seed=seed, positions=512, reward=True)), dtype="fp32"
        )
        for seed, name in enumerate(("first", "second", "third"), 5)
    }
    return RewardModels(options, "second")


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", ROWS)


Evaluate = Callable[..., OpenEndedResults]


@pytest.fixture(scope="module")
def evaluated(
    small_models: list[EvaluatedModel], reward_models: RewardModels, prompts_file: Path
) -> Evaluate:
    """Evaluates both models in fp32 with the reward models as judge."""

    def evaluate(output: Path, sampling: Sampling = FEW, **options) -> OpenEndedResults:
        prompts = read_prompts(prompts_file, sampling.limit)
        texts = [f"{model.name}={model.directory}" for model in small_models]
        participants = participants_named(texts, prompts, None, "fp32")
        judges = Judges(reward_models)
        return evaluate_open_ended(participants, prompts, output, judges, sampling=sampling, **options)

    return evaluate


@pytest.fixture(scope="module")
def finished(evaluated: Evaluate, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OpenEndedResults]:
    """An output and its results; to be read."""
    output = tmp_path_factory.mktemp("finished")
    return output, evaluated(output, baseline="beta")


@pytest.fixture
def output(finished: tuple[Path, OpenEndedResults], tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "output")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_transformers(model: EvaluatedModel, messages: list[dict[str, str]]) -> str:
    """The greedy answer of transformers' own generation, with tokens that have text only."""
    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    network = AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    silent = set(tokenizer.all_special_ids) | set(range(len(tokenizer), network.config.vocab_size))
    silent |= {tokenizer.convert_tokens_to_ids(name) for name in ("<|bos|>", "<|im_start|>")}
    found = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=FEW.max_new_tokens,
        suppress_tokens=sorted(silent - {tokenizer.eos_token_id}),
        pad_token_id=0,
    )
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_model_answers_in_its_own_template_and_sees_its_own_answers(
    finished: tuple[Path, OpenEndedResults], small_models: list[EvaluatedModel]
) -> None:
    output, results = finished
    for model in small_models:
        for prompt in results.prompts:
            messages = []
            for turn, question in enumerate(prompt.turns, 1):
                messages.append({"role": "user", "content": question})
                found = results.answers[model.name][prompt.id, turn]
                assert found.text == by_transformers(model, messages), (model.name, prompt.id, turn)
                messages.append({"role": "assistant", "content": found.text})
    header, *stored = rows_of(output / "answers" / "alpha.jsonl")
    assert header["made_from"]["max_new_tokens"] == 6 and header["made_from"]["temperature"] == 0
    assert len(stored) == 5 and {row["turn"] for row in stored} == {1, 2}


def test_scores_are_those_of_the_reward_models_and_decide_by_vote(
    finished: tuple[Path, OpenEndedResults], reward_models: RewardModels
) -> None:
    output, results = finished
    rows = rows_of(output / "judgements.jsonl")
    assert len(rows) == 5 and {(row["model"], row["opponent"]) for row in rows} == {("alpha", "beta")}
    prompts = {prompt.id: prompt for prompt in results.prompts}
    for name, options in reward_models.options.items():
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        network = AutoModelForSequenceClassification.from_pretrained(options.model, dtype=torch.float32)
        for row in rows:
            for side, score in zip(("alpha", "beta"), row["scores"][name], strict=True):
                of_model = results.answers[side]
                messages = []
                for turn in range(1, row["turn"] + 1):
                    messages.append({"role": "user", "content": prompts[row["prompt"]].turns[turn - 1]})
                    answer = of_model[row["prompt"], turn].text
                    messages.append({"role": "assistant", "content": answer})
                # The template prints a line end after the stop token, where the reward is read.
                text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
                ids = tokenizer(text, return_tensors="pt").input_ids
                hidden = network.model(ids).last_hidden_state[0, -1]
                assert score == pytest.approx(network.score(hidden).item(), abs=1e-4)
    for row in rows:
        votes = {name: 1 if first > second else 0 for name, (first, second) in row["scores"].items()}
        assert row["preference"] == (sum(votes.values()) > 1)
    written = json.loads((output / "open_ended.json").read_text())
    assert written["judges"][0]["settings"]["strongest"] == "second"
    pair = written["judges"][0]["pairs"][0]
    assert pair["overall"]["win_rate"]["value"] == sum(row["preference"] for row in rows) / 5


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(answers, "load_causal_lm", load)
    monkeypatch.setattr(reward_judge, "load_reward_model", load)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    evaluated: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    whole = evaluated(tmp_path / "whole", replace(FEW, temperature=1.0))
    added: list[object] = []
    original = Records.add

    def add(self: Records, row: object) -> None:
        if len(added) in (3, 8, 15):  # within the first and the second model, and the scores
            added.append(None)
            raise KeyboardInterrupt
        original(self, row)
        added.append(row)

    monkeypatch.setattr(Records, "add", add)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            evaluated(tmp_path / "parts", replace(FEW, temperature=1.0))
    # A line that was being written when the process was killed.
    with (tmp_path / "parts" / "answers" / "alpha.jsonl").open("a") as file:
        file.write('{"prompt": "1", "turn"')
    parts = evaluated(tmp_path / "parts", replace(FEW, temperature=1.0))
    assert parts.answers == whole.answers
    for one, other in zip(parts.judges[0].judgements, whole.judges[0].judgements, strict=True):
        assert (one.comparison, one.preference) == (other.comparison, other.preference)
        for name, scores in other.grounds["scores"].items():  # other batches round in another way
            assert one.grounds["scores"][name] == pytest.approx(scores, abs=1e-4)
    done = [row for row in added if row is not None]
    stored = [rows_of(path) for path in (tmp_path / "whole").glob("*/*.jsonl")]
    assert len(done) == sum(len(rows) - 1 for rows in stored)  # nothing was made twice

    request.getfixturevalue("nothing_is_loaded")
    assert evaluated(tmp_path / "parts", replace(FEW, temperature=1.0)).answers == whole.answers


def test_answers_depend_on_the_seed_and_not_on_the_batch(
    small_models: list[EvaluatedModel], prompts_file: Path, tmp_path: Path
) -> None:
    prompts = read_prompts(prompts_file)
    texts = [f"{model.name}={model.directory}" for model in small_models]
    alpha, _ = participants_named(texts, prompts, None, "fp32")
    sampled = replace(FEW, temperature=1.0)
    together = Generator(alpha, sampled).answers(prompts, tmp_path / "together", 10_000)
    assert Generator(alpha, sampled).answers(prompts, tmp_path / "alone", 1) == together
    assert Generator(alpha, replace(sampled, seed=1)).answers(prompts, tmp_path / "seed", 1) != together


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (replace(FEW, temperature=0.5), "made with temperature 0.0, but this call has 0.5"),
        (replace(FEW, max_new_tokens=7), "made with max_new_tokens 6, but this call has 7"),
        (replace(FEW, limit=2), "made with limit None, but this call has 2"),
    ],
)
def test_answers_of_other_settings_are_refused(
    evaluated: Evaluate, output: Path, sampling: Sampling, message: str, nothing_is_loaded: None
) -> None:
    with pytest.raises(UserError, match=rf"answers/alpha.jsonl: the file was {message}.*remove the file"):
        evaluated(output, sampling)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{}", r":3: damaged \(prompt: missing"), ("x", ":3: damaged"), ('{"prompt": 1}', ":3: damaged")],
)
def test_a_damaged_answer_is_named(
    evaluated: Evaluate, output: Path, line: str, message: str, nothing_is_loaded: None
) -> None:
    path = output / "answers" / "alpha.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], f"{line}\n", *lines[2:]]))
    with pytest.raises(UserError, match=rf"alpha.jsonl{message}"):
        evaluated(output)


def test_a_prompt_that_leaves_no_room_has_an_empty_answer_that_loses(
    small_models: list[EvaluatedModel], reward_models: RewardModels, prompts_file: Path, tmp_path: Path
) -> None:
    prompts = read_prompts(prompts_file)
    short = save_model(tmp_path / "short", "llama", positions=24)
    texts = [f"alpha={small_models[0].directory}", f"short={short}"]
    participants = participants_named(texts, prompts, None, "fp32")
    results = evaluate_open_ended(participants, prompts, tmp_path / "o", Judges(reward_models), sampling=FEW)
    counts = results.counts("short")
    assert counts.empty and counts.truncated >= counts.empty
    (pair,) = results.judges[0].pairs
    assert pair.overall.losses >= counts.empty - results.counts("alpha").empty


def test_answers_that_no_reward_model_can_read_have_no_verdict(
    small_models: list[EvaluatedModel], prompts_file: Path, tmp_path: Path
) -> None:
    prompts = read_prompts(prompts_file)
    short = save_model(tmp_path / "rm", "llama", positions=4, reward=True)
    texts = [f"{model.name}={model.directory}" for model in small_models]
    judges = Judges(RewardModels({"rm": RewardModelOptions(model=str(short), dtype="fp32")}, "rm"))
    participants = participants_named(texts, prompts, None, "fp32")
    results = evaluate_open_ended(participants, prompts, tmp_path / "o", judges, sampling=FEW)
    (pair,) = results.judges[0].pairs
    assert pair.overall.no_verdict == 5 and pair.overall.win_rate is None
    assert "5 of 5 comparisons have no verdict" in " ".join(results.notes)
    assert "too long for a reward model" in (tmp_path / "o" / "judgements.jsonl").read_text()


def test_the_command_prints_tables_and_escapes_the_page(
    run_tool: Callable[..., int],
    reward_models: RewardModels,
    small_models: list[EvaluatedModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [FILE, {"instruction": "x", "responses": {"one": "y"}}])
    options = ["--open-ended", str(prompts), "--output", str(tmp_path / "out"), "--max-new-tokens", "4"]
    options += ["--dtype", "fp32", "--pairs", "all", "--baseline", "one"]
    for name, each in reward_models.options.items():
        options += ["--reward-model", f"{name}={each.model}"]
    assert run_tool("one", "two", f"alpha={small_models[0].directory}", *options) == 0
    printed = capsys.readouterr().out
    assert "| two against one | 1 |" in printed or "| two against one | 0 |" in printed
    assert "alpha against two" in printed and "alpha against one" in printed
    assert "two: 1 of 2 turns have no answer in the prompts file" in printed
    assert (tmp_path / "out" / "open_ended.md").read_text().strip() in printed
    page = (tmp_path / "out" / "open_ended.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "&lt;i&gt;a fig&lt;/i&gt;" in page
    assert (tmp_path / "out" / "open_ended.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "open_ended.json").read_text())
    assert written["made_from"]["sampling"] == {
        "limit": None,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 4,
        "seed": 0,
    }
    assert written["made_from"]["models"]["alpha"]["dtype"] == "fp32" and written["baseline"] == "one"


def test_a_recipe_gives_sources_and_reward_models_beside_a_judge_on_a_server(
    run_tool: Callable[..., int],
    reward_models: RewardModels,
    small_models: list[EvaluatedModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    pytest.importorskip("openai", reason="openai is not installed: pip install 'megatron-fuse[server]'")
    alpha = str(small_models[0].directory)
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    recipe = {
        "workdir": str(tmp_path / "run"),
        "target": {"model": alpha, "dtype": "fp32", "chat_template": str(template)},
        "sources": {"own": {"model": alpha, "dtype": "fp32"}},
        "data": {"path": "data.jsonl"},
        "schedule": {"preset": "fuse"},
        "reward_models": {name: each.model_dump() for name, each in reward_models.options.items()},
        "selection": {"strongest": "third"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    prompts = write_rows(tmp_path / "p.jsonl", ROWS)
    with scripted(lambda _: completion("[[C]]")) as server:
        options = ["--recipe", str(tmp_path / "recipe.yaml"), "--judge-url", server.url]
        options += ["--judge-model", "small", "--judge-extra", '{"max_tokens": null, "top_k": 1}']
        options += ["--open-ended", str(prompts), "--output", str(tmp_path / "out"), "--dtype", "fp32"]
        options += ["--max-new-tokens", "4", "--limit", "2"]
        assert run_tool("target", "own", f"alpha={alpha}", *options) == 0
    assert all(asked.body["top_k"] == 1 and "max_tokens" not in asked.body for asked in server.asked)
    written = json.loads((tmp_path / "out" / "open_ended.json").read_text())
    of_rewards, of_server = written["judges"]
    assert of_rewards["settings"]["strongest"] == "third" and of_server["judge"] == "small"
    pairs = [(pair["model"], pair["opponent"]) for pair in of_server["pairs"]]
    assert pairs == [("own", "target"), ("alpha", "target")] and written["turns"] == 4
    assert all(pair["overall"]["ties"] == 4 for pair in of_server["pairs"])
    made_from = written["made_from"]["models"]
    # The same model in its own template, by either name, and in the template of the recipe.
    assert made_from["own"] == made_from["alpha"]
    assert made_from["target"]["chat format"] != made_from["own"]["chat format"]
    assert "Win rates by small" in capsys.readouterr().out


OPEN = ["one", "two", "--open-ended", "{prompts}", "--output", "{output}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (OPEN, "nothing judges the answers: give --recipe with reward_models, or --reward-model"),
        ([*OPEN, "--baseline", "x", "--reward-model", "a={output}"], "a: {output} has no config.json"),
        ([*OPEN, "--data", "d", "--batch-size", "3"], "--data, --batch-size: for --tasks only"),
        (["a=b", "--tasks", "openllm", "--output", "o", "--seed", "0"], "--seed: for --open-ended only"),
        ([*OPEN, "--temperature", "-1"], "--temperature: Input should be greater than or equal to 0"),
        ([*OPEN, "--temperature", "0.001"], "--temperature: must be 0, or at least 0.01"),
        ([*OPEN, "--top-p", "2"], "--top-p: Input should be less than or equal to 1"),
        ([*OPEN, "--limit", "0"], "--limit must be at least 1"),
        ([*OPEN, "--judge-url", "http://h/v1"], "--judge-model: the key is required, but missing"),
        ([*OPEN, "--judge-url", "h", "--judge-model", "m"], "url must be a base URL"),
        ([*OPEN, "--judge-timeout", "soon"], "--judge-timeout: must be a number, not 'soon'"),
        ([*OPEN, "--judge-extra", "{{"], "--judge-extra: must be JSON, not '{{'"),
        (["one", *OPEN[2:], "--judge-url", "http://h/v1", "--judge-model", "m"], "name at least two models"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, run_tool: Callable[..., int], tmp_path: Path, capsys
) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [FILE])
    places = {"prompts": prompts, "output": tmp_path / "out"}
    assert run_tool(*(word.format(**places) for word in arguments)) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_baseline_is_refused(evaluated: Evaluate, tmp_path: Path, nothing_is_loaded: None) -> None:
    with pytest.raises(
        UserError, match=r"--baseline 'gamma' is not one of the models\. Choose one of alpha, beta"
    ):
        evaluated(tmp_path, baseline="gamma")
