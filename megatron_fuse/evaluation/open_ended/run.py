"""The whole open-ended evaluation: checks the inputs, generates answers, judges them, and compares the
models.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.open_ended.answers import Answers, Generator, Sampling, given_answers
from megatron_fuse.evaluation.open_ended.judgements import (
    PAIRS,
    Judgement,
    PairwiseComparison,
    comparisons_of,
    pairs_of,
)
from megatron_fuse.evaluation.open_ended.participants import Participant
from megatron_fuse.evaluation.open_ended.prompts import Prompt
from megatron_fuse.evaluation.open_ended.results import Judged, OpenEndedResults
from megatron_fuse.evaluation.open_ended.reward_judge import RewardModels, judge_by_reward_models
from megatron_fuse.evaluation.open_ended.server_judge import SAMPLING, TEXTS, judge_by_server
from megatron_fuse.evaluation.open_ended.win_rates import pair_results
from megatron_fuse.recipe import ServerOptions
from megatron_fuse.storage import remove_abandoned, sha256_of_json


@dataclass(frozen=True)
class Judges:
    """The judges of an evaluation, at least one. batch_tokens: of the reward models."""

    reward_models: RewardModels | None = None
    server: ServerOptions | None = None
    batch_tokens: int = 16384

    def settings(self) -> dict[str, dict[str, Any]]:
        """Name of every judge -> everything that decides its verdicts.

        Raises UserError if there is no judge, or if files of a reward model are missing or damaged.
        """
        found = {}
        if self.reward_models:
            names = ", ".join(self.reward_models.options)
            found[f"reward models ({names})"] = self.reward_models.settings()
        if self.server:
            named = {"model": self.server.model, "answers_as": self.server.answers_as}
            found[self.server.model] = {**named, **SAMPLING, **self.server.extra, "texts": TEXTS}
        if not found:
            raise UserError(
                "nothing judges the answers: give --recipe with reward_models, or --reward-model, or "
                "--judge-url and --judge-model"
            )
        return found

    def judge(
        self, comparisons: Sequence[PairwiseComparison], answers: Mapping[str, Answers], output: Path
    ) -> list[list[Judgement]]:
        """The judgements of the comparisons by every judge, in the order of `settings`."""
        found = []
        if self.reward_models:
            found.append(
                judge_by_reward_models(self.reward_models, comparisons, answers, output, self.batch_tokens)
            )
        if self.server:
            found.append(judge_by_server(self.server, comparisons, answers, output))
        return found


def evaluate_open_ended(
    participants: Sequence[Participant],
    prompts: Sequence[Prompt],
    output: Path,
    judges: Judges,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008, frozen
    baseline: str | None = None,
    pairs: str = "baseline",
    batch_tokens: int = 16384,
) -> OpenEndedResults:
    """Answers the prompts with every model, judges pairs of answers, and writes OUTPUT/open_ended.*.

    Finished answers, scores and replies in OUTPUT are not made again. baseline: the name of a model, None for
    the first. pairs: one of PAIRS. batch_tokens: of generation.

    Raises UserError for errors in models or earlier results before anything is generated, and for a model or
    judge that fails later. What is finished then stays.
    """
    names = [participant.name for participant in participants]
    baseline = baseline or names[0]
    if baseline not in names:
        raise UserError(
            f"--baseline {baseline!r} is not one of the models. Choose one of {', '.join(names)}."
        )
    if pairs not in PAIRS:
        raise ValueError(f"pairs is {pairs!r}, not one of {', '.join(PAIRS)}")
    # Everything is checked before the first model is loaded.
    judge_settings = judges.settings()
    generators = {each.name: Generator(each, sampling) for each in participants if each.options}
    for generator in generators.values():
        generator.check_earlier(prompts, output)
    remove_abandoned(output)
    answers: dict[str, Answers] = {}
    made_from: dict[str, Any] = {}
    for name in names:
        if name in generators:
            answers[name] = generators[name].answers(prompts, output, batch_tokens)
            made_from[name] = generators[name].made_from(prompts)
            gc.collect()  # frees the memory of the device before the next model is loaded
        else:
            answers[name] = given_answers(name, prompts)
            made_from[name] = {"answers of the prompts file": _answers_sha256(answers[name])}
    compared = pairs_of(names, baseline, pairs)
    comparisons = comparisons_of(prompts, answers, compared)
    if not comparisons:
        raise UserError("no turn of a prompt has answers of two models that are compared: nothing to judge")
    found = judges.judge(comparisons, answers, output)
    judged = [
        Judged(name, settings, pair_results(judgements, answers, compared), judgements)
        for (name, settings), judgements in zip(judge_settings.items(), found, strict=True)
    ]
    settings = {"sampling": asdict(sampling), "pairs": pairs, "models": made_from}
    results = OpenEndedResults(prompts, baseline, answers, judged, settings)
    from megatron_fuse.evaluation.open_ended.page import write_results  # imports matplotlib

    write_results(results, output)
    return results


def _answers_sha256(answers: Answers) -> str:
    return sha256_of_json([[*place, answer.text] for place, answer in answers.items()])
