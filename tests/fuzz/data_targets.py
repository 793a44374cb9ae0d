"""Files of data: instructions in their forms and containers, answers and scores from elsewhere, questions
of benchmarks.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
from campaign import FuzzTarget
from pyarrow import parquet
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.benchmarks import BENCHMARKS
from megatron_fuse.evaluation.data_files import check_files
from megatron_fuse.evaluation.open_ended.answers import Answer
from megatron_fuse.evaluation.open_ended.prompts import read_prompts
from megatron_fuse.evaluation.open_ended.records import open_records
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import Example, prepare_instructions
from megatron_fuse.instructions.rows import read_rows
from megatron_fuse.recipe import ResponseFile, ScoreFile
from megatron_fuse.responses import Response
from megatron_fuse.responses.given import given_answers
from megatron_fuse.scoring.given_scores import given_scores
from megatron_fuse.stages import Context
from megatron_fuse.storage import write_jsonl

Rows = list[dict[str, Any]]
TEXTS = ["Sure: 12 + 30 = 42.", "日本 and été are words. 🙂", "Yes.", " begins and ends with a space "]
_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 12.5, "b": [null, {"c": "é"}]}'}}
FORMS: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "alpaca": lambda n, text: {
        "instruction": f"Question {n}?",
        "input": "",
        "output": text,
        "system": "Be brief.",
    },
    "sharegpt": lambda n, text: {
        "conversations": [{"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": text}]
    },
    "messages": lambda n, text: {
        "messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": text}]
    },
    "tools": lambda n, text: {
        "messages": [
            {"role": "user", "content": f"Question {n}?"},
            {"role": "assistant", "content": None, "tool_calls": [_CALL, {**_CALL, "id": f"call_{n}"}]},
            {"role": "tool", "content": text, "tool_call_id": f"call_{n}"},
            {"role": "assistant", "content": text},
        ],
        "tools": '[{"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": '
        '"number"}}}}]',
    },
    "orca": lambda n, text: {"system_prompt": "", "question": f"Question {n}?", "response": text},
}


@cache
def shared() -> Path:
    """A model with its tokenizer that no target damages."""
    return save_model(Path(tempfile.mkdtemp(prefix="fuzz-model-")), "llama")


@cache
def chat_format() -> ChatFormat:
    recipe = small_recipe(Path("run"), Path("data.jsonl"), shared(), {"s": shared()})
    return load_format(recipe.target, "target")


def examples(count: int = 8) -> list[Example]:
    return [
        Example(f"e{n}", None, [{"role": "user", "content": f"Question {n}?"}], TEXTS[n % len(TEXTS)])
        for n in range(count)
    ]


def rows_in(form: str) -> Rows:
    return [{"id": f"e{n}", "category": "colour", **FORMS[form](n, TEXTS[n % len(TEXTS)])} for n in range(8)]


def read_instructions(path: Path) -> None:
    """Every usable row is an example that can be written and split."""
    rows = read_rows(path)
    write_jsonl(path.parent / "out/examples.jsonl", (example.as_row() for example in rows.read()))
    write_jsonl(path.parent / "out/bad_rows.jsonl", rows.bad)


def instructions(form: str) -> FuzzTarget:
    return FuzzTarget(
        name=f"instructions-{form}",
        make_seeds=lambda directory: write_rows(directory / "data.jsonl", rows_in(form)),
        run=lambda directory: read_instructions(directory / "data.jsonl"),
        names=("data.path",),
    )


def _save_parquet(directory: Path) -> None:
    parquet.write_table(
        pyarrow.Table.from_pylist(rows_in("messages")), directory / "data.parquet", row_group_size=3
    )


def _save_as_datasets_do(directory: Path) -> None:
    """What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write, as far as it is read."""
    table = pyarrow.Table.from_pylist(rows_in("alpaca"))
    (directory / "saved/train").mkdir(parents=True)
    path = directory / "saved/train/data-00000-of-00001.arrow"
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "x",
        "_split": "train",
    }
    (directory / "saved/train/state.json").write_text(json.dumps(state))
    (directory / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


def _read_as_datasets_do(directory: Path) -> None:
    try:
        read_instructions(directory / "saved")
    except UserError as error:
        # Whole, it names the splits; damaged, this reader is the one to be asked about.
        if "holds several splits" not in str(error):
            raise
    read_instructions(directory / "saved/train")


def _prepare(directory: Path) -> None:
    """The whole stage. A refusal leaves nothing behind."""
    model = shared()
    recipe = small_recipe(
        directory / "run", directory / "data.jsonl", model, {"s": model}, data={"validation_samples": 1}
    )
    try:
        prepare_instructions(Context(recipe))
    except UserError:
        assert not (directory / "run").exists(), "a refusal left a directory behind"
        raise


def _answers(directory: Path) -> None:
    rows = [{"id": f"e{n}", "response": text, "truncated": n == 1} for n, text in enumerate(TEXTS * 2)]
    write_rows(directory / "by_id.jsonl", rows)
    prompts = [
        {"prompt": f"Question {n}?", "answers": {"vicuna-7b-v1.5": text}} for n, text in enumerate(TEXTS)
    ]
    prompts += [{"prompt": [{"role": "user", "content": "Question 7?"}], "answers": {"vicuna-7b-v1.5": "x"}}]
    write_rows(directory / "by_prompt.jsonl", prompts)


def _read_answers(directory: Path) -> None:
    by_id = ResponseFile(path=directory / "by_id.jsonl")
    given_answers(by_id, "sources.s.responses", chat_format(), examples())(0, examples())
    by_prompt = ResponseFile(
        path=directory / "by_prompt.jsonl", match="prompt", response="answers.vicuna-7b-v1.5"
    )
    answers = given_answers(by_prompt, "sources.s.responses", chat_format(), examples())(0, examples())
    write_jsonl(directory / "out.jsonl", [asdict(answer) for answer in answers if answer])


def _scores(directory: Path) -> None:
    write_rows(
        directory / "mappings.jsonl", [{"id": f"e{n}", "scores": {"a": n / 3, "b": -n}} for n in range(8)]
    )
    triples = [{"id": f"e{n}", "source": "a", "score": n, "response": TEXTS[0]} for n in range(8)]
    write_rows(directory / "triples.jsonl", triples)


def _read_scores(directory: Path) -> None:
    answers = [Response(example.id, TEXTS[0], truncated=False, tokens=1) for example in examples()]
    for name in ("mappings", "triples"):
        given = given_scores(ScoreFile(path=directory / f"{name}.jsonl"), "reward_models.reward.scores")
        given.check("a", examples())
        given.of_source("a", examples(), answers)


def _questions() -> dict[str, Rows]:
    choices = ["a fox", "two dogs", "figs", "pears"]
    arc = [{"id": str(n), "query": f"Question: {n}", "choices": choices, "gold": n % 4} for n in range(27)]
    hellaswag = [
        {
            "ind": n,
            "activity_label": "Cooking",
            "ctx_a": f"A {n}",
            "ctx_b": "he",
            "endings": choices,
            "label": n % 4,
        }
        for n in range(12)
    ]
    mmlu = [
        {"subject": "anatomy", "question": f"Q {n}?", "choices": choices, "answer": "ABCD"[n % 4]}
        for n in range(6)
    ]
    truthful = [
        {"question": f"Q {n}?", "mc2_targets": {"choices": choices, "labels": [1, 0, 1, 0]}} for n in range(3)
    ]
    winogrande = [
        {"context_options": ["he", "she"], "continuation": f"ran {n}", "gold": n % 2} for n in range(8)
    ]
    gsm8k = [{"question": f"{n} + 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(8)]
    return {
        "arc_challenge.jsonl": arc,
        "hellaswag.jsonl": hellaswag,
        "mmlu_test.jsonl": mmlu,
        "mmlu_dev_5shot.jsonl": mmlu,
        "truthfulqa_mc.jsonl": truthful,
        "winogrande.jsonl": winogrande,
        "gsm8k_test.jsonl": gsm8k,
    }


def _write_questions(directory: Path) -> None:
    for name, rows in _questions().items():
        write_rows(directory / name, rows)


def _check_questions(directory: Path) -> None:
    for benchmark in BENCHMARKS.values():
        check_files(benchmark, directory)


def _write_prompts(directory: Path) -> None:
    mt_bench = [
        {
            "question_id": n,
            "category": "writing",
            "turns": [text, "Again?"],
            "reference": [text, None],
            "responses": {"one": [text, "yes"], "two": text},
        }
        for n, text in enumerate(TEXTS)
    ]
    alpaca = [
        {
            "id": f"a{n}",
            "dataset": "koala",
            "instruction": text,
            "input": "",
            "responses": {"one": text},
            "turn2": {"instruction": "Again?", "responses": {"one": text}},
        }
        for n, text in enumerate(TEXTS)
    ]
    write_rows(directory / "prompts.jsonl", [*mt_bench, *alpaca])
    with open_records(directory / "answers.jsonl", Answer, {"seed": 0, "stop": ["x"]}) as records:
        for text in TEXTS:
            records.add(Answer("p", 1, text, tokens=3))


def _read_prompts(directory: Path) -> None:
    read_prompts(directory / "prompts.jsonl")


def _read_records(directory: Path) -> None:
    with open_records(directory / "answers.jsonl", Answer, {"seed": 0, "stop": ["x"]}):
        pass


TARGETS = [
    *(instructions(form) for form in FORMS),
    FuzzTarget(
        "instructions-parquet",
        _save_parquet,
        lambda directory: read_instructions(directory / "data.parquet"),
        names=("data.path",),
    ),
    FuzzTarget("instructions-datasets", _save_as_datasets_do, _read_as_datasets_do, names=("data.path",)),
    FuzzTarget(
        "instructions-stage",
        lambda directory: write_rows(directory / "data.jsonl", rows_in("messages")),
        _prepare,
        files=("data.jsonl",),
        share=0.3,
        names=("data.path",),
    ),
    FuzzTarget("given-responses", _answers, _read_answers, names=("sources.s.responses",)),
    FuzzTarget("given-scores", _scores, _read_scores, names=("reward_models.reward.scores",)),
    FuzzTarget("evaluation-questions", _write_questions, _check_questions, share=2),
    FuzzTarget("open-ended-prompts", _write_prompts, _read_prompts, files=("prompts.jsonl",)),
    FuzzTarget(
        "open-ended-records",
        _write_prompts,
        _read_records,
        files=("answers.jsonl",),
        names=("the file was made with",),
    ),
]
