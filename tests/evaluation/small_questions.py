"""Questions of every benchmark, made by the tests: as files of `--data`, and as the rows that the
harness's own tasks read on the hub.
"""

import json
import random
from pathlib import Path
from typing import Any

from small_models import save_model, write_rows

from megatron_fuse.evaluation import EvaluatedModel

ROWS = 27  # one more than ARC-Challenge's 25 examples and the question
SUBJECTS = ("anatomy", "high_school_physics")
WORDS = ("fox", "dog", "pear", "apple", "fig", "quick", "brown", "lazy", "It is 42.", "jumps over")
POSITIONS = 4096  # the worked examples of GSM8K take 2700 tokens of the small tokenizer

Rows = dict[str, list[dict[str, Any]]]  # file or split -> rows


def question_files(seed: int = 0) -> Rows:
    """Rows by the names of the files; every question names itself, so that a prompt shows which rows it is
    made of.
    """
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    def choices(count: int) -> list[str]:
        return [f"{words(rng.randint(1, 4))} {letter}" for letter in "abcdefg"[:count]]

    def mmlu(kind: str, count: int) -> list[dict[str, Any]]:
        return [
            {
                "id": f"{kind}-{subject}-{n}",
                "subject": subject,
                "question": f" {kind} {subject} <{n}> {words(3)} ",
                "choices": choices(4),
                "answer": rng.choice("ABCD"),
            }
            for n in range(count)
            for subject in SUBJECTS
        ]

    def gsm8k(n: int) -> dict[str, Any]:
        left, right = rng.randint(500, 999), rng.randint(500, 999)
        answer = f"{left} + {right} = <<{left}+{right}={left + right}>>{left + right}\n#### {left + right:,}"
        return {"id": f"gsm8k-{n}", "question": f"<{n}> What is {left} + {right}?", "answer": answer}

    def truthful(n: int) -> dict[str, Any]:
        labels = [1] * rng.randint(1, 3) + [0] * rng.randint(1, 3)
        return {
            "id": n,
            "question": f"<{n}> {words(3)}?",
            "mc2_targets": {"choices": choices(len(labels)), "labels": labels},
        }

    return {
        "arc_challenge.jsonl": [
            {
                "id": str(n),
                "query": f"Question: <{n}> {words(3)}",
                "choices": choices(4),
                "gold": rng.randrange(4),
            }
            for n in range(ROWS)
        ],
        "hellaswag.jsonl": [
            {
                "ind": n,
                "activity_label": f"<{n}>",
                "ctx_a": f"{words(3)}  [title] {words(1)}",
                "ctx_b": "she",
                "endings": [f"{choice} [step]" for choice in choices(4)],
                "label": rng.randrange(4),
            }
            for n in range(ROWS)
        ],
        "mmlu_test.jsonl": mmlu("test", 5),
        "mmlu_dev_5shot.jsonl": mmlu("dev", 6),
        "truthfulqa_mc.jsonl": [truthful(n) for n in range(ROWS)],
        "winogrande.jsonl": [
            {
                "id": str(n),
                "context_options": [f"<{n}> the {name}" for name in ("fox", "dog")],
                "continuation": words(2),
                "gold": rng.randrange(2),
            }
            for n in range(ROWS)
        ],
        "gsm8k_test.jsonl": [gsm8k(n) for n in range(ROWS)],
    }


def write_questions(directory: Path, rows: Rows | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, of_file in (rows or question_files()).items():
        write_rows(directory / name, of_file)
    return directory


def hub_rows(task: str, rows: Rows) -> Rows:
    """The rows of one benchmark as they are on the hub, by split."""
    if task == "arc_challenge":
        return {
            "test": [
                {
                    "question": row["query"].removeprefix("Question: "),
                    "choices": {"text": row["choices"], "label": list("ABCD")},
                    "answerKey": "ABCD"[row["gold"]],
                }
                for row in rows["arc_challenge.jsonl"]
            ]
        }
    if task == "winogrande":
        return {
            "test": [
                {
                    "sentence": f"{row['context_options'][0].removesuffix('fox')}_ {row['continuation']}",
                    "option1": "fox",
                    "option2": "dog",
                    "answer": str(row["gold"] + 1),
                }
                for row in rows["winogrande.jsonl"]
            ]
        }
    if task == "mmlu":  # one subject, as the harness has a task for each
        files = {"test": "mmlu_test.jsonl", "dev": "mmlu_dev_5shot.jsonl"}
        return {
            split: [
                row | {"answer": "ABCD".index(row["answer"])}
                for row in rows[name]
                if row["subject"] == SUBJECTS[0]
            ]
            for split, name in files.items()
        }
    name = {"hellaswag": "hellaswag.jsonl", "truthfulqa_mc2": "truthfulqa_mc.jsonl"}.get(
        task, "gsm8k_test.jsonl"
    )
    return {"test": json.loads(json.dumps(rows[name]))}


def small_model(directory: Path, family: str, seed: int) -> EvaluatedModel:
    """A random model that reads the longest prompts, named after its directory."""
    return EvaluatedModel(directory.name, save_model(directory, family, seed=seed, positions=POSITIONS))
