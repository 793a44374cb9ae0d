"""The tool's numbers are the harness's; finished measurements are kept, what does not belong with them is
refused.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_models import write_rows
from small_questions import hub_rows, question_files

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation import (
    BENCHMARKS,
    EvaluatedModel,
    Settings,
    benchmarks_named,
    evaluate,
    harness,
)
from megatron_fuse.evaluation.benchmarks import TASKS
from megatron_fuse.evaluation.results import load_result, result_path

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megatron-fuse[eval]'")

FEW = Settings(limit=3, max_new_tokens=8)
WINOGRANDE, TRUTHFULQA = BENCHMARKS["winogrande"], BENCHMARKS["truthfulqa_mc2"]
QUICK = [WINOGRANDE, TRUTHFULQA]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, small_models: list[EvaluatedModel], questions: Path
) -> Path:
    """OUTPUT of both models on two tasks; to be read."""
    output = tmp_path_factory.mktemp("finished")
    evaluate(small_models, QUICK, output, data=questions, settings=FEW)
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "output")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(model directory, task) of everything that runs from here on."""
    calls = []
    original = harness.run_task

    def run_task(model, benchmark, *rest):
        calls.append((Path(model.pretrained).name, benchmark.name))
        return original(model, benchmark, *rest)

    monkeypatch.setattr(harness, "run_task", run_task)
    return calls


def test_the_numbers_are_those_of_the_harness_called_directly(
    small_models: list[EvaluatedModel], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = small_models[0]
    comparison, failures = evaluate([model], [*BENCHMARKS.values()], tmp_path, data=questions, settings=FEW)
    assert not failures
    monkeypatch.chdir(questions)  # the YAML files name files of the working directory
    # Takes seconds to list installed packages.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    options = {"limit": FEW.limit, "batch_size": 8, "gen_kwargs": {"max_gen_toks": 8}, "device": "cpu"}
    table = json.loads((tmp_path / "evaluation.json").read_text())
    for row, written in zip(comparison.rows, table["rows"], strict=True):
        tasks = [row.benchmark.local]
        where = {"pretrained": str(model.directory)}
        direct = simple_evaluate("hf", where, tasks=tasks, task_manager=manager, **options)
        metric, _, kind = row.benchmark.metric.partition(",")
        expected = direct["results"][row.benchmark.local]
        shown = row.values[model.name]
        assert (shown.value, shown.standard_error) == (
            expected[row.benchmark.metric],
            expected[f"{metric}_stderr,{kind}"],
        )
        assert written["values"][model.name]["value"] == shown.value
        samples = [sample for sample in direct["samples"][row.benchmark.local] if sample["filter"] == kind]
        result = load_result(result_path(tmp_path, model.name, row.benchmark.name))
        assert list(result.metrics[row.benchmark.metric].outcomes) == [sample[metric] for sample in samples]
        assert [text.split()[1] for text in result.questions] == [
            sample["doc_hash"][:16] for sample in samples
        ]
        assert result.metrics.keys() == {name for name in expected if "," in name and "_stderr" not in name}
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_evaluation_runs_nothing_again(
    output: Path, small_models: list[EvaluatedModel], questions: Path, nothing_runs: None
) -> None:
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    evaluate(small_models, QUICK, output, data=questions, settings=FEW)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_only_what_is_missing_is_measured(
    output: Path, small_models: list[EvaluatedModel], questions: Path, measured: list[tuple[str, str]]
) -> None:
    before = result_path(output, "beta", "winogrande").read_bytes()
    result_path(output, "beta", "winogrande").unlink()
    evaluate(small_models, QUICK, output, data=questions, settings=FEW)
    assert measured == [("beta", "winogrande")]
    old, new = json.loads(before), json.loads(result_path(output, "beta", "winogrande").read_bytes())
    assert {**old, "seconds": 0} == {**new, "seconds": 0}


def other_weights(model: Path, data: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = min(weights)
    save_file(weights | {name: weights[name] + 1}, model / "model.safetensors", {"format": "pt"})


def other_template(model: Path, data: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")


def other_question(model: Path, data: Path) -> None:
    write_rows(data / "winogrande.jsonl", question_files(seed=9)["winogrande.jsonl"])


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (Settings(limit=4, max_new_tokens=8), None, "made with limit 3, but this call has 4"),
        (Settings(3, True, 8), None, "made with apply_chat_template False, but this call has True"),
        (Settings(3, False, 9), None, "made with max_new_tokens 8, but this call has 9"),
        (FEW, other_weights, "made with model fingerprint '[0-9a-f]{64}', but this call has '[0-9a-f]{64}'"),
        (FEW, other_template, "made with model fingerprint"),
        (
            FEW,
            other_question,
            "made with data winogrande.jsonl '[0-9a-f]{64}', but this call has '[0-9a-f]{64}'",
        ),
    ],
)
def test_results_of_something_else_are_refused(
    output: Path,
    small_models: list[EvaluatedModel],
    questions: Path,
    tmp_path: Path,
    settings,
    change,
    message,
    nothing_runs,
) -> None:
    alpha = EvaluatedModel("alpha", shutil.copytree(small_models[0].directory, tmp_path / "alpha"))
    data = shutil.copytree(questions, tmp_path / "data")
    if change:
        change(alpha.directory, data)
    with pytest.raises(
        UserError,
        match=rf"alpha/winogrande.json: the file was {message}.*\. Give another --output, or remove",
    ):
        evaluate([alpha], [WINOGRANDE], output, data=data, settings=settings)


def test_a_model_that_is_not_named_now_guards_the_settings_too(
    output: Path, small_models: list[EvaluatedModel], questions: Path, nothing_runs: None
) -> None:
    gamma = EvaluatedModel("gamma", small_models[0].directory)
    with pytest.raises(
        UserError, match=r"alpha/winogrande.json: the file was made with limit 3, but this call has None"
    ):
        evaluate([gamma], [WINOGRANDE], output, data=questions, settings=Settings(max_new_tokens=8))


def test_a_crash_names_model_and_task_and_leaves_the_others(
    small_models: list[EvaluatedModel],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    run_tool,
) -> None:
    original = harness.run_task

    def run_task(model, benchmark, *rest):
        if benchmark is WINOGRANDE and model.pretrained.endswith("alpha"):
            raise RuntimeError("no memory left")
        return original(model, benchmark, *rest)

    monkeypatch.setattr(harness, "run_task", run_task)
    models = [f"{model.name}={model.directory}" for model in small_models]
    options = ["--tasks", "winogrande", "truthfulqa_mc2", "--limit", "3", "--max-new-tokens", "8"]
    arguments = [*models, *options, "--data", str(questions), "--output", str(tmp_path)]
    assert run_tool(*arguments) == 2
    printed = capsys.readouterr()
    note = "alpha on WinoGrande: failed with RuntimeError: no memory left"
    assert note in printed.out
    assert "error: alpha on winogrande failed. Run the same command again: it repeats these" in printed.err
    assert note in (tmp_path / "evaluation.md").read_text()
    assert "no memory left" in (tmp_path / "alpha/winogrande.error.txt").read_text()
    results = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.json")}
    assert results == {"alpha/truthfulqa_mc2.json", "beta/truthfulqa_mc2.json", "beta/winogrande.json"}

    monkeypatch.setattr(harness, "run_task", original)
    assert run_tool(*arguments) == 0
    assert "finished before" in capsys.readouterr().err
    assert result_path(tmp_path, "alpha", "winogrande").is_file()
    assert not list(tmp_path.rglob("*.error.txt"))


def test_a_model_that_cannot_be_loaded_leaves_the_others(
    small_models: list[EvaluatedModel], questions: Path, tmp_path: Path
) -> None:
    broken = EvaluatedModel("broken", shutil.copytree(small_models[0].directory, tmp_path / "broken"))
    (broken.directory / "config.json").write_text('{"model_type": "none of ours"}')
    output = tmp_path / "output"
    comparison, failures = evaluate(
        [broken, small_models[1]], [WINOGRANDE], output, data=questions, settings=FEW
    )
    assert list(failures) == [("broken", "winogrande")]
    assert comparison.rows[0].values["beta"].value is not None
    assert comparison.rows[0].differences == {"beta": None}


def test_an_interruption_leaves_whole_results_only(
    small_models: list[EvaluatedModel], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = harness.run_task

    def run_task(model, benchmark, *rest):
        if benchmark is TRUTHFULQA:
            raise KeyboardInterrupt
        return original(model, benchmark, *rest)

    monkeypatch.setattr(harness, "run_task", run_task)
    with pytest.raises(KeyboardInterrupt):
        evaluate(small_models, QUICK, tmp_path, data=questions, settings=FEW)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["winogrande.json"]


def test_a_short_model_is_measured_and_what_it_did_not_read_is_counted(
    questions: Path, tmp_path: Path
) -> None:
    from small_models import save_model

    short = EvaluatedModel("short", save_model(tmp_path / "short", "llama", positions=64))
    tasks = benchmarks_named(["winogrande", "gsm8k"])
    comparison, failures = evaluate([short], tasks, tmp_path / "output", data=questions, settings=FEW)
    assert not failures
    (note,) = comparison.notes
    assert note.startswith(
        "short on WinoGrande; GSM8K: 3 of 3 prompts were longer than the model's 64 positions"
    )


def test_the_chat_template_changes_what_is_asked(
    output: Path, small_models: list[EvaluatedModel], questions: Path, tmp_path: Path
) -> None:
    settings = Settings(3, True, 8)
    evaluate(small_models[:1], [WINOGRANDE], tmp_path / "chat", data=questions, settings=settings)
    chat = load_result(result_path(tmp_path / "chat", "alpha", "winogrande"))
    plain = load_result(result_path(output, "alpha", "winogrande"))
    assert chat.questions == plain.questions
    assert chat.made_from["apply_chat_template"] is True
    bare = EvaluatedModel("bare", shutil.copytree(small_models[0].directory, tmp_path / "bare"))
    config = json.loads((bare.directory / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (bare.directory / "tokenizer_config.json").write_text(json.dumps(config))
    (bare.directory / "chat_template.jinja").unlink(missing_ok=True)
    _, failures = evaluate([bare], [WINOGRANDE], tmp_path / "bare output", data=questions, settings=settings)
    assert "has no chat template, which --apply-chat-template needs" in failures["bare", "winogrande"]


@pytest.mark.slow
def test_the_harness_s_own_tasks_run_over_rows_of_the_hub_s_form(
    small_models: list[EvaluatedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = question_files()
    tasks = {
        "ai2_arc": "arc_challenge",
        "hellaswag": "hellaswag",
        "mmlu": "mmlu",
        "truthful_qa": "truthfulqa_mc2",
    }
    tasks |= {"winogrande": "winogrande", "gsm8k": "gsm8k"}

    def load_dataset(path: str, name: str | None = None, **_) -> dict:
        splits = hub_rows(tasks[path.split("/")[1]], rows)
        return {
            split: datasets.Dataset.from_list(splits.get(split, splits["test"]))
            for split in ("train", "validation", "test", "dev")
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = Settings(limit=2, max_new_tokens=4)
    comparison, failures = evaluate(small_models, [*BENCHMARKS.values()], tmp_path, settings=settings)
    assert not failures
    assert [row.questions for row in comparison.rows] == [2, 2, 57 * 2, 2, 2, 2, 2]
    for row in comparison.rows:
        for model in small_models:
            outcomes = (
                load_result(result_path(tmp_path, model.name, row.benchmark.name))
                .metrics[row.benchmark.metric]
                .outcomes
            )
            assert row.values[model.name].value == pytest.approx(sum(outcomes) / len(outcomes), abs=1e-12)


SLICES = Path(__file__).parents[3] / "shared" / "data" / "eval"


@pytest.mark.slow
@pytest.mark.skipif(not SLICES.is_dir(), reason="needs the evaluation slices")
def test_real_questions_are_asked_without_the_network(
    small_models: list[EvaluatedModel], tmp_path: Path
) -> None:
    settings = Settings(limit=2, max_new_tokens=4)
    comparison, failures = evaluate(
        small_models[:1], [*BENCHMARKS.values()], tmp_path, data=SLICES, settings=settings
    )
    assert not failures
    assert [row.questions for row in comparison.rows] == [2] * len(BENCHMARKS)


def test_importing_the_package_brings_neither_torch_nor_the_harness(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, megatron_fuse.evaluation; print([m for m in ('torch', 'lm_eval', 'transformers') if "
        "m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
