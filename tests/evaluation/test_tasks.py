"""The tasks over files ask what the harness's own tasks ask, and no question finds its own answer among
its examples.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import write_rows
from small_questions import SUBJECTS, hub_rows, question_files, write_questions

from megatron_fuse.evaluation import BENCHMARKS
from megatron_fuse.evaluation.benchmarks import TASKS
from megatron_fuse.evaluation.harness import local_task, make_task_manager
from megatron_fuse.evaluation.scoring import last_number, last_numbers, truthful_mass

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megatron-fuse[eval]'")
HARNESS_TASKS = Path(lm_eval.__file__).parent / "tasks"
HARNESS_FILES = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": f"mmlu/default/mmlu_{SUBJECTS[0]}.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}


def load_yaml(path: Path) -> dict[str, Any]:
    # Here, because it imports datasets and pandas, which the other tests do not need.
    from lm_eval.tasks import _yaml_loader

    return _yaml_loader.load_yaml(path)


def requests_of(task: Any, shots: int, limit: int | None = None) -> list[Any]:
    """(context, continuation or generation options) of all questions."""
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=limit)
    return [request.args for request in task.instances]


def our_requests(name: str, data: Path, cache: Path, limit: int | None = None) -> list[Any]:
    specification = local_task(BENCHMARKS[name], data, cache)
    (task,) = make_task_manager(data).load([specification])["tasks"].values()
    return requests_of(task, task.config.num_fewshot, limit)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_task_over_files_makes_the_prompts_of_the_harness_s_own(name: str, tmp_path: Path) -> None:
    from lm_eval.api.task import ConfigurableTask

    rows = question_files(seed=3)
    if name == "mmlu":
        rows |= {
            file: [row for row in rows[file] if row["subject"] == SUBJECTS[0]]
            for file in BENCHMARKS[name].files
        }
    files = {
        split: str(write_rows(tmp_path / f"{split}.jsonl", of)) for split, of in hub_rows(name, rows).items()
    }
    own = load_yaml(HARNESS_TASKS / HARNESS_FILES[name])
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    if BENCHMARKS[name].examples_in_same_file and BENCHMARKS[name].shots:
        splits["fewshot_split"] = "test"
    dataset = {"data_files": files, "cache_dir": str(tmp_path / "theirs")}
    own |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": dataset, **splits}
    own.pop("tag", None)
    theirs = requests_of(ConfigurableTask(config=own), BENCHMARKS[name].shots)
    ours = our_requests(name, write_questions(tmp_path / "data", rows), tmp_path / "ours")
    assert ours == theirs


@pytest.mark.parametrize("name", BENCHMARKS)
def test_shots_and_the_hub_s_task_are_those_of_the_files(name: str) -> None:
    benchmark = BENCHMARKS[name]
    ours = load_yaml(TASKS / f"{benchmark.local}.yaml")
    assert (ours["task"], ours["num_fewshot"]) == (benchmark.local, benchmark.shots)
    ours_on_the_hub = TASKS / f"{benchmark.hub}.yaml"
    file = {"mmlu": "mmlu/default/_mmlu.yaml"}.get(name, HARNESS_FILES[name])
    hub = load_yaml(ours_on_the_hub if ours_on_the_hub.is_file() else HARNESS_TASKS / file)
    assert benchmark.hub == hub.get("group", hub["task"])
    metric, _, filter_name = benchmark.metric.partition(",")
    for task in (ours, load_yaml(HARNESS_TASKS / HARNESS_FILES[name]) if "group" in hub else hub):
        assert metric in {entry["metric"] for entry in task["metric_list"]}
        assert filter_name in {entry["name"] for entry in task.get("filter_list", [{"name": "none"}])}


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.examples_in_same_file])
def test_a_question_is_not_among_its_own_examples(name: str, questions: Path, tmp_path: Path) -> None:
    requests = our_requests(name, questions, tmp_path)
    per_prompt = []
    for context, *_ in requests:
        marks = [text.split(">")[0] for text in context.split("<")[1:] if text.split(">")[0].isdigit()]
        per_prompt.append(marks)
        assert len(set(marks)) == len(marks) == BENCHMARKS[name].shots + 1
    assert len({marks[-1] for marks in per_prompt}) == len(
        question_files()[next(iter(BENCHMARKS[name].files))]
    )


def test_the_examples_of_mmlu_are_the_first_of_the_question_s_subject(
    questions: Path, tmp_path: Path
) -> None:
    contexts = list(dict.fromkeys(context for context, _ in our_requests("mmlu", questions, tmp_path)))
    asked = [row["subject"] for row in question_files()["mmlu_test.jsonl"]]
    assert len(contexts) == len(asked)
    for subject, context in zip(asked, contexts, strict=True):
        assert context.count(f"dev {subject} <") == context.count("dev ") == 5
        assert all(f"dev {subject} <{n}>" in context for n in range(5))
        assert f"about {subject.replace('_', ' ')}." in context


numbers = st.integers(0, 10**9)
plain = st.text(st.characters(exclude_categories=["Nd", "No", "Nl"], exclude_characters=".,+-"))


@given(before=st.text(), number=numbers, after=plain, commas=st.booleans())
def test_the_last_number_is_found_behind_any_text(before: str, number: int, after: str, commas: bool) -> None:
    text = f"{before} {number:,}{after}" if commas else f"{before} {number}{after}"
    assert last_number(text) == str(number)


@given(
    before=plain,
    whole=numbers,
    fraction=st.from_regex(r"[0-9]{1,4}", fullmatch=True),
    sign=st.sampled_from(["", "-", "+"]),
)
def test_a_decimal_fraction_keeps_its_sign(before: str, whole: int, fraction: str, sign: str) -> None:
    assert last_number(f"{before} {sign}{whole}.{fraction} dollars.") == f"{sign}{whole}.{fraction}"


@given(plain)
def test_a_text_without_numbers_is_its_own_answer(text: str) -> None:
    assert last_number(text) == text
    assert last_numbers([[text, "3 and 4"]], [{}]) == [[text, "4"]]


answers = st.lists(st.tuples(st.floats(-200, 0), st.booleans()), min_size=2, max_size=8)


@given(answers=answers, true=st.data(), shift=st.sampled_from([0.0, -1e4]))
def test_truthful_mass_is_the_harness_s_and_survives_underflow(
    answers: list, true: st.DataObject, shift: float
) -> None:
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    labels = true.draw(st.lists(st.integers(0, 1), min_size=len(answers), max_size=len(answers)))
    doc = {"mc2_targets": {"labels": labels}}
    expected = process_results_mc2(doc, answers)["acc"]
    shifted = [(value + shift, greedy) for value, greedy in answers]
    assert np.isclose(truthful_mass(doc, shifted)["acc"], expected, rtol=1e-9, atol=1e-12)
