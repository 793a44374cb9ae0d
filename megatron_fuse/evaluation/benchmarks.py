"""The benchmarks: those of the Open LLM Leaderboard with its shots and metrics, and GSM8K in two forms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.question_rows import (
    Arc,
    Gsm8k,
    HellaSwag,
    Mmlu,
    Question,
    TruthfulQA,
    WinoGrande,
)

TASKS = Path(__file__).with_name("tasks")  # YAML tasks for the harness


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, which is one line of the table.

    shots: number of few-shot examples.
    hub: name of the harness's task over a data set of the Hugging Face hub.
    local: name of the task over files, tasks/LOCAL.yaml.
    metric: the reported metric under the harness's name, `metric,filter`. For all of them a higher number is
    better.
    files: file name in the data directory -> form of its rows. The first file holds the questions.
    """

    name: str
    title: str
    shots: int
    metric: str
    hub: str
    local: str
    files: Mapping[str, type[Question]]
    examples_in_same_file: bool = True  # the few-shot examples are other rows of the file of questions

    @property
    def heading(self) -> str:
        metric = self.metric.removesuffix(",none").replace(",", ", ")
        return f"{self.title} ({self.shots}-shot, {metric})"


_ALL = (
    Benchmark(
        name="arc_challenge",
        title="ARC-Challenge",
        shots=25,
        metric="acc_norm,none",
        hub="arc_challenge",
        local="arc_challenge_local",
        files={"arc_challenge.jsonl": Arc},
    ),
    Benchmark(
        name="hellaswag",
        title="HellaSwag",
        shots=10,
        metric="acc_norm,none",
        hub="hellaswag",
        local="hellaswag_local",
        files={"hellaswag.jsonl": HellaSwag},
    ),
    Benchmark(
        name="mmlu",
        title="MMLU",
        shots=5,
        metric="acc,none",
        hub="mmlu",
        local="mmlu_local",
        files={"mmlu_test.jsonl": Mmlu, "mmlu_dev_5shot.jsonl": Mmlu},
        examples_in_same_file=False,
    ),
    Benchmark(
        name="truthfulqa_mc2",
        title="TruthfulQA",
        shots=0,
        metric="acc,none",
        hub="truthfulqa_mc2",
        local="truthfulqa_mc2_local",
        files={"truthfulqa_mc.jsonl": TruthfulQA},
    ),
    Benchmark(
        name="winogrande",
        title="WinoGrande",
        shots=5,
        metric="acc,none",
        hub="winogrande",
        local="winogrande_local",
        files={"winogrande.jsonl": WinoGrande},
    ),
    Benchmark(
        name="gsm8k_cot",
        title="GSM8K, chain of thought",
        shots=8,
        metric="exact_match,last-number",
        hub="gsm8k_cot_last_number",
        local="gsm8k_cot_last_number_local",
        files={"gsm8k_test.jsonl": Gsm8k},
        examples_in_same_file=False,
    ),
    Benchmark(
        name="gsm8k",
        title="GSM8K",
        shots=5,
        metric="exact_match,strict-match",
        hub="gsm8k",
        local="gsm8k_local",
        files={"gsm8k_test.jsonl": Gsm8k},
    ),
)

BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
GROUPS: Mapping[str, Sequence[str]] = {"openllm": tuple(BENCHMARKS)}


def benchmarks_named(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names and groups, in this order, each once.

    Raises UserError for an unknown name.
    """
    benchmarks: dict[str, Benchmark] = {}
    for name in names:
        if name not in BENCHMARKS and name not in GROUPS:
            groups = ", ".join(f"{group} (all of {', '.join(members)})" for group, members in GROUPS.items())
            raise UserError(
                f"--tasks: {name!r} is not a known task. Choose from {', '.join(BENCHMARKS)} and the group "
                f"{groups}."
            )
        benchmarks |= {member: BENCHMARKS[member] for member in GROUPS.get(name, (name,))}
    return list(benchmarks.values())
