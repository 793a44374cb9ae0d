"""The whole open-ended evaluation: checks the inputs, generates answers, judges them, and compares the
models.
"""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.open_ended.answers import Answers, Generator, Sampling, given_answers
from megatron_fuse.evaluation.open_ended.judgements import PAIRS, Judgement, Match, matches_of, pairs_of
from megatron_fuse.evaluation.open_ended.participants import Participant
from megatron_fuse.evaluation.open_ended.prompts import Prompt
from megatron_fuse.evaluation.open_ended.results import Judged, OpenEndedResults
from megatron_fuse.evaluation.open_ended.reward_judge import RewardModels, judge_by_reward_models
from megatron_fuse.evaluation.open_ended.server_judge import MAX_TOKENS, TEXTS, judge_by_server
from megatron_fuse.evaluation.open_ended.win_rates import pair_results
from megatron_fuse.recipe import ServerOptions
from megatron_fuse.storage import remove_abandoned, sha256_of_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judges:
    """The judges of an evaluation, at least one. batch_tokens: of the reward models."""

    reward_models: RewardModels | None = None
    server: ServerOptions | None = None
    batch_tokens: int = 16384

    def judge(
        self, matches: Sequence[Match], answers: Mapping[str, Answers], output: Path
    ) -> list[tuple[str, dict[str, Any], list[Judgement]]]:
        """(name, settings, judgements of the matches) of every judge."""
        found: list[tuple[str, dict[str, Any], list[Judgement]]] = []
        if self.reward_models:
            judgements = judge_by_reward_models(
                self.reward_models, matches, answers, output, self.batch_tokens
            )
            names = ", ".join(self.reward_models.options)
            found.append((f"reward models ({names})", self.reward_models.described(), judgements))
        if self.server:
            judgements = judge_by_server(self.server, matches, answers, output)
            options = self.server.model_dump(include={"model", "answers_as", "extra"})
            settings = {**options, "temperature": 0.0, "max_tokens": MAX_TOKENS, "texts": TEXTS}
            found.append((self.server.model, settings, judgements))
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
    if not (judges.reward_models or judges.server):
        raise UserError(
            "nothing judges the answers: give --recipe with reward_models, or --reward-model, or --judge-url "
            "and --judge-model"
        )
    remove_abandoned(output)
    # All models are checked before the first one is loaded.
    generators = {each.name: Generator(each, sampling) for each in participants if each.options}
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
    matches = matches_of(prompts, answers, compared)
    if not matches:
        raise UserError("no turn of a prompt has answers of two models that are compared: nothing to judge")
    judged = [
        Judged(name, settings, pair_results(judgements, answers, compared), judgements)
        for name, settings, judgements in judges.judge(matches, answers, output)
    ]
    settings = {"sampling": asdict(sampling), "pairs": pairs, "models": made_from}
    results = OpenEndedResults(prompts, baseline, answers, judged, settings)
    from megatron_fuse.evaluation.open_ended.page import write_results  # imports matplotlib

    write_results(results, output)
    return results


def _answers_sha256(answers: Answers) -> str:
    return sha256_of_json([[*place, answer.text] for place, answer in answers.items()])
