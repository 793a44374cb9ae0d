"""MMLU from two files: every question comes after the examples of its own subject.

Only the harness imports this.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from lm_eval.api.task import ConfigurableTask


class BySubject(ConfigurableTask):
    """A YAML task whose few-shot examples are the first rows of the question's subject in the few-shot split.

    The harness has 57 tasks and a group for this. The mean of the group over all questions is the accuracy of
    this one task.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        rows = sorted(self.fewshot_docs(), key=_subject)  # stable: the order within a subject is the file's
        self._examples = {subject: list(of_subject) for subject, of_subject in groupby(rows, _subject)}

    def fewshot_context(self, doc: Mapping[str, Any], *arguments: Any, **named: Any) -> str | list[str]:
        self.sampler.replace_df(self._examples[doc["subject"]])
        return super().fewshot_context(doc, *arguments, **named)


def _subject(row: Mapping[str, Any]) -> str:
    return row["subject"]
